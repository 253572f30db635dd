"""Copies by the CUDA runtime that torch has loaded, given arrays of addresses instead of lists of Python numbers.

`cuda-bindings` takes the same calls, but turns every address into a Python object first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable
from typing import Any, cast

import torch

from checkpoint_engine.errors import CheckpointEngineError, MissingDependencyError

__all__ = ["MOST_COPIES", "CopyCalls", "load_copy_calls"]

logger = logging.getLogger(__name__)

MOST_COPIES = 4096
"""Of one call."""
_BY_ADDRESS = 4
"""`cudaMemcpyDefault`: the driver knows which memory an address is of."""
_IN_STREAM_ORDER = 1
_WITHOUT_FAIL_INDEX = 13
"""The major version from which on `cudaMemcpyBatchAsync` says no more which copy failed."""

_Pair = tuple[torch.Tensor, torch.Tensor]


class _Attributes(ctypes.Structure):
    """`cudaMemcpyAttributes`: the order of reading, two hints of place (kind, number), and flags."""

    _fields_ = [(name, ctypes.c_int) for name in ("order", "source", "source_id", "target", "target_id", "flags")]


class CopyCalls:
    """What the runtime offers, found once a process."""

    def __init__(self, library: ctypes.CDLL, major: int) -> None:
        """Takes the functions of a loaded library; `major` is the version of CUDA that it is of."""
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy = _function(library, "cudaMemcpyAsync", pointer, pointer, size, ctypes.c_int, pointer)
        self._copy_rows = _function(
            library, "cudaMemcpy2DAsync", pointer, size, pointer, size, size, size, ctypes.c_int, pointer
        )
        self._last_error = _function(library, "cudaGetLastError")
        self._describe = _function(library, "cudaGetErrorString", ctypes.c_int, result=ctypes.c_char_p)
        fail_index = () if major >= _WITHOUT_FAIL_INDEX else (pointer,)
        self._batch: Any = None
        if hasattr(library, "cudaMemcpyBatchAsync"):  # CUDA 12.8 and newer
            types = (pointer, pointer, pointer, size, pointer, pointer, size, *fail_index, pointer)
            self._batch = _function(library, "cudaMemcpyBatchAsync", *types)
        self._failed = ctypes.c_size_t()
        self._fail_index = (ctypes.addressof(self._failed),) if fail_index else ()

    def copy(self, targets: torch.Tensor, sources: torch.Tensor, sizes: torch.Tensor, stream: int) -> None:
        """Queues copies of bytes in batches; addresses and sizes are contiguous 1-D int64 on the CPU.

        Args:
            targets: Addresses on the GPU.
            sources: Addresses on the GPU or in the host's memory.
            sizes: Bytes of each.
            stream: The runtime's handle; not that of the default stream, which takes no batches.

        Raises:
            CheckpointEngineError: the runtime refuses.
        """
        for begin in range(0, len(sizes), MOST_COPIES):
            part = slice(begin, begin + MOST_COPIES)
            arrays = (targets[part], sources[part], sizes[part])
            if not self._copy_batch(*arrays, stream):
                self.copy_each(zip(*(cast("Any", array).tolist() for array in arrays), strict=True), stream)

    def copy_each(self, copies: Iterable[tuple[int, int, int]], stream: int) -> None:
        """Queues copies one by one; each says to which address, from which, and how many bytes.

        Raises:
            CheckpointEngineError: the runtime refuses.
        """
        for target, source, nbytes in copies:
            error = self._copy(target, source, nbytes, _BY_ADDRESS, stream)
            if error:
                self._check(error, f"copying {nbytes} bytes")

    def copy_rows(self, targets: _Pair, sources: _Pair, shapes: _Pair, stream: int) -> None:
        """Queues copies of rows; all columns are 1-D int64 on the CPU.

        Args:
            targets: Addresses, and how far apart the rows lie there.
            sources: Likewise.
            shapes: Width in bytes, and number of rows.
            stream: The runtime's handle.

        Raises:
            CheckpointEngineError: the runtime refuses.
        """
        columns = (cast("Any", column).tolist() for column in (*targets, *sources, *shapes))
        for arguments in zip(*columns, strict=True):
            self._check(self._copy_rows(*arguments, _BY_ADDRESS, stream), "copying rows")

    def _copy_batch(self, targets: torch.Tensor, sources: torch.Tensor, sizes: torch.Tensor, stream: int) -> bool:
        """Whether the runtime, and the driver below it, can do it."""
        if self._batch is None:
            return False
        attributes = _Attributes(order=_IN_STREAM_ORDER)
        first = ctypes.c_size_t(0)
        error = self._batch(
            targets.data_ptr(),
            sources.data_ptr(),
            sizes.data_ptr(),
            len(sizes),
            ctypes.addressof(attributes),
            ctypes.addressof(first),
            1,
            *self._fail_index,
            stream,
        )
        if error:
            # A real fault, such as memory that is not there, shows again when the copies are done one by one.
            logger.info("no batches of copies with this driver (%s)", self._text(error))
            self._batch = None
            self._last_error()
        return not error

    def _check(self, error: int, doing: str) -> None:
        if error:
            self._last_error()  # the error is sticky and would be blamed on the next kernel
            raise CheckpointEngineError(f"CUDA failed while {doing}: {self._text(error)}")

    def _text(self, error: int) -> str:
        return f"error {error}: {self._describe(error).decode()}"


@functools.cache
def load_copy_calls() -> CopyCalls:
    """Those of this process.

    Raises:
        MissingDependencyError: torch is not for CUDA, or brings no runtime that can be found.
    """
    major = int((torch.version.cuda or "0").partition(".")[0])
    name = f"libcudart.so.{major}"
    try:
        library = ctypes.CDLL(name)  # the one that is loaded already, by its name
    except OSError as error:
        raise MissingDependencyError(f"torch {torch.__version__} comes without {name}, which copies need") from error
    return CopyCalls(library, major)


def _function(library: ctypes.CDLL, name: str, *types: type, result: type = ctypes.c_int) -> Any:  # noqa: ANN401 - ctypes does not type them
    function = getattr(library, name)
    function.argtypes, function.restype = types, result
    return function
