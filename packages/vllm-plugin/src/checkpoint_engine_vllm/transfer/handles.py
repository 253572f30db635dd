"""Handles of tensors on a GPU, as torch shares them and vLLM's trainers send them: read without running anything.

Over HTTP they come pickled. The reader here builds lists, dicts, tuples, numbers, strings and bytes, and knows the few
names that a handle has in it, none of which it looks up or calls.
"""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from checkpoint_engine.sdk.deliveries import torch_dtype

__all__ = ["Handle", "read_handle", "read_pickled"]

_FIELDS = 15
"""Of what `torch.multiprocessing.reductions.reduce_tensor` makes of a tensor on a GPU."""
_COUNTER_PREFIX = b"/torch_"
"""Of the names of shared memory in which torch counts who uses a tensor."""
_LONGEST = 256 << 20
_CLASSES = frozenset(
    {
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.storage", "TypedStorage"),
        ("torch.storage", "UntypedStorage"),
    }
)


@dataclass(frozen=True)
class Handle:
    """A tensor in another process's memory of a GPU."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Of its first element in its storage, in elements."""
    dtype: str
    storage: bytes
    """The driver's handle of the allocation."""
    storage_bytes: int
    storage_offset: int
    """Of the storage in the allocation, in bytes."""
    counter: bytes
    counter_offset: int
    event: bytes
    event_must_be_awaited: bool


class _Name(str):
    """The name of something of torch's, which is not looked up."""

    __slots__ = ()


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - pickle's own signature
        """What a name in the pickle stands for: itself."""
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) in _CLASSES or module == "torch":
            return _Name(name)
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a handle")

    def persistent_load(self, pid: object) -> object:
        """Handles refer to nothing outside."""
        raise pickle.UnpicklingError(f"a handle that refers to {pid!r}")


def read_pickled(text: str) -> object:
    """What vLLM's HTTP client made of handles: pickled, in base64.

    Raises:
        ValueError: it is anything but handles; nothing was run.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"`ipc_handles_pickled` is longer than {_LONGEST} characters")
    try:
        return _Reader(io.BytesIO(base64.b64decode(text, validate=True))).load()
    except (pickle.UnpicklingError, binascii.Error, EOFError) as error:
        raise ValueError(f"`ipc_handles_pickled` is no pickle of handles: {error}") from error
    except (TypeError, AttributeError, IndexError, KeyError, OverflowError, MemoryError, ImportError) as error:
        # whatever else a made-up pickle brings about in the reader
        raise ValueError(f"`ipc_handles_pickled` is no pickle of handles ({type(error).__name__})") from error


def read_handle(found: object, device: str) -> Handle:
    """The handle for a device, out of a map from the identities of devices.

    Raises:
        ValueError: it is none, or the trainer's tensors lie on other devices.
    """
    by_device = cast("Mapping[object, object]", found if isinstance(found, Mapping) else {})
    if device not in by_device:
        raise ValueError(
            f"no handle for GPU {device}, the trainer sends those of {', '.join(map(str, by_device)) or 'none'}: each "
            "worker needs a trainer's rank on its own GPU"
        )
    fields = by_device[device]
    if not isinstance(fields, (tuple, list)) or len(cast("Sequence[object]", fields)) != _FIELDS:
        raise ValueError(f"a handle for GPU {device} does not have {_FIELDS} fields, as torch's have")
    _, shape, stride, offset, _, dtype, _, storage, nbytes, start, _, counter, at, event, awaited = cast(
        "Sequence[Any]", fields
    )
    handle = Handle(
        _numbers(shape),
        _numbers(stride),
        _number(offset),
        _dtype(dtype),
        _raw(storage),
        _number(nbytes),
        _number(start),
        _raw(counter),
        _number(at),
        _raw(event),
        bool(awaited),
    )
    if handle.counter and not handle.counter.startswith(_COUNTER_PREFIX):
        raise ValueError(f"a handle names {handle.counter!r} for torch's counter, which is none of torch's")
    return handle


def _numbers(found: object) -> tuple[int, ...]:
    if not isinstance(found, (tuple, list)):
        raise ValueError(f"a handle has {found!r} for a shape")  # noqa: TRY004 - vLLM makes 400 of a ValueError
    return tuple(_number(each) for each in cast("Sequence[object]", found))


def _number(found: object) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"a handle has {found!r} for a number")
    return found


def _raw(found: object) -> bytes:
    if found is None:
        return b""
    if not isinstance(found, bytes):
        raise ValueError(f"a handle has {type(found).__name__} for bytes")  # noqa: TRY004 - as above
    return found


def _dtype(found: object) -> str:
    name = str(found).rpartition(".")[2]
    torch_dtype(name)
    return name
