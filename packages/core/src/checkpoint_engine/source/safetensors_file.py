"""Reads the header of a `.safetensors` file, and believes none of it.

The format: a little-endian u64, so many bytes of JSON, then the data that the JSON describes without a gap.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.dtypes import dtype_of_code, item_size
from checkpoint_engine.errors import AccessRefusedError, CheckpointFormatError, UnsupportedTensorError

__all__ = ["Opener", "SafetensorsFile", "read_header"]

Opener = Callable[[Path, int], int]
"""Opens a file by path and flags, as in the built-in `open`; may refuse what it has opened."""

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000
_LARGEST_COUNT = (1 << 63) - 1
_MOST_DIMENSIONS = 64
_LONGEST_QUOTE = 200
_METADATA = "__metadata__"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NUMPY = b"\x93NUMPY"
_SHARDING = "DCP_SHARDING_INFO"
"""Where torch's distributed checkpoint says which part of each tensor a file holds."""
_SHARD_NAME = re.compile(r"shard-\d+-model-.*")
_PACKED = "F4"
"""The code of elements of which two share a byte; torch counts pairs."""
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class SafetensorsFile:
    """What a file holds. Offsets of `tensors` are ascending and relative to `data_start`."""

    path: Path
    data_start: int
    data_nbytes: int
    tensors: tuple[TensorEntry, ...]
    stamp: tuple[int, int, int, int]
    """Device, inode, size and time of change: what was read of the header holds for this file only."""

    def check_unchanged(self, descriptor: int) -> None:
        """Raises if the open file is not the one whose header was read.

        Raises:
            CheckpointFormatError: it is another, or was written to.
        """
        stamp = _stamp(descriptor)
        if stamp != self.stamp:
            raise CheckpointFormatError(
                f"{self.path} changed while it was being read (its size was {self.stamp[2]} bytes and is {stamp[2]}); "
                "register it once its writer is done"
            )

    @contextlib.contextmanager
    def open(self) -> Generator[int, None, None]:
        """A descriptor of the file, for reading.

        Raises:
            CheckpointFormatError: the file is gone or changed, before or during use.
        """
        with _open(self.path) as descriptor:
            self.check_unchanged(descriptor)
            yield descriptor
            self.check_unchanged(descriptor)


def read_header(path: Path, opener: Opener = os.open) -> SafetensorsFile:
    """Reads and checks the header. Whoever opens the file later is held to what `opener` opened.

    Raises:
        CheckpointFormatError: the file is missing, truncated, or contradicts itself.
        UnsupportedTensorError: a tensor has a dtype that cannot be carried.
    """
    with _open(path, opener) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointFormatError(f"{path} is not a file")
        stamp = _stamp(descriptor)
        size = stamp[2]
        head = os.pread(descriptor, _LENGTH.size, 0)
        if head == _LFS_POINTER[: _LENGTH.size] and os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
            raise CheckpointFormatError(f"{path} is not the file but Git LFS's pointer to it; git lfs pull fetches it")
        if head.startswith(_NUMPY):
            raise CheckpointFormatError(f"{path} is a NumPy file, which names no tensors; pass them as named_tensors")
        if len(head) < _LENGTH.size:
            raise CheckpointFormatError(f"{path} has {size} bytes, too few for a safetensors file")
        (length,) = _LENGTH.unpack(head)
        if length > _LARGEST_HEADER:
            raise CheckpointFormatError(
                f"{path} announces a header of {length} bytes, at most {_LARGEST_HEADER} are taken; "
                "is it a safetensors file?"
            )
        header = _read_exactly(descriptor, path, length)
    data_start = _LENGTH.size + length
    tensors = _parse(path, header, size - data_start)
    return SafetensorsFile(path, data_start, size - data_start, tensors, stamp)


@contextlib.contextmanager
def _open(path: Path, opener: Opener = os.open) -> Generator[int, None, None]:
    try:
        # A FIFO would block the opening for ever.
        descriptor = opener(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except AccessRefusedError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointFormatError(f"cannot read {path}: {reason}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stamp(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_exactly(descriptor: int, path: Path, length: int) -> bytes:
    try:
        header = os.pread(descriptor, length, _LENGTH.size)
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < length:
        raise CheckpointFormatError(f"{path} is truncated: its header has {length} bytes, {len(header)} are there")
    return header


def _parse(path: Path, header: bytes, data_nbytes: int) -> tuple[TensorEntry, ...]:
    if not header.startswith(b"{"):
        raise CheckpointFormatError(f"{path} is not a safetensors file: its header does not start with '{{'")
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # includes non-UTF-8
        raise CheckpointFormatError(f"the header of {path} is broken: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"the header of {path} is not a JSON object")
    fields = cast("dict[str, Any]", content)
    metadata = _metadata(path, fields.pop(_METADATA, None))
    _refuse_parts(path, metadata.get(_SHARDING))
    placed = [_entry(path, name, description) for name, description in fields.items()]
    placed.sort(key=lambda pair: (pair[0].offset, pair[1]))
    _check_gapless(path, placed, data_nbytes)
    return tuple(tensor for tensor, _ in placed)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {_short(key)} occurs twice")
        content[key] = value
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _metadata(path: Path, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    values = cast("dict[str, object]", metadata).values() if isinstance(metadata, dict) else (None,)
    if not all(isinstance(value, str) for value in values):
        raise CheckpointFormatError(f"{_METADATA} in the header of {path} does not map text to text")
    return cast("dict[str, str]", metadata)


def _refuse_parts(path: Path, sharding: str | None) -> None:
    """Raises if tensors of the file are parts of tensors: under their names they would pass for the whole."""
    if sharding is None:
        return
    offsets = re.findall(r'"saved_offsets"\s*:\s*\[([^\]]*)\]', sharding)
    if _SHARD_NAME.fullmatch(path.name) or any(set(each) - set("0, ") for each in offsets):
        raise CheckpointFormatError(
            f"{path} is a shard of torch's distributed checkpoint, with parts of tensors; have torch put the shards "
            "together (torch.distributed.checkpoint's consolidate_safetensors_files), and send those files"
        )


def _entry(path: Path, name: str, description: object) -> tuple[TensorEntry, int]:
    """The tensor, and where its data ends."""
    where = f"tensor {_short(name)} in {path}"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointFormatError(f"{where}: its name is not text")
    if not isinstance(description, dict) or set(cast("dict[str, object]", description)) != _FIELDS:
        raise CheckpointFormatError(f"{where}: not described by dtype, shape and data_offsets")
    fields = cast("dict[str, object]", description)
    code, shape = fields["dtype"], _counts(fields["shape"])
    offsets = _counts(fields["data_offsets"])
    if not isinstance(code, str):
        raise CheckpointFormatError(f"{where}: the dtype {_short(code)} is not text")
    if shape is not None and len(shape) > _MOST_DIMENSIONS:
        raise UnsupportedTensorError(f"{where}: {len(shape)} dimensions, at most {_MOST_DIMENSIONS} can be carried")
    if shape is None or math.prod(max(size, 1) for size in shape) > _LARGEST_COUNT:
        raise CheckpointFormatError(f"{where}: the shape {_short(fields['shape'])} is impossible")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004 - begin and end
        raise CheckpointFormatError(f"{where}: the offsets {_short(fields['data_offsets'])} are impossible")
    if code == _PACKED:
        shape = _in_pairs(where, shape)
    try:
        dtype = dtype_of_code(code)
        needed = math.prod(shape) * item_size(dtype)
    except UnsupportedTensorError as error:
        raise UnsupportedTensorError(f"{where}: {error}") from None
    if offsets[1] - offsets[0] != needed:
        raise CheckpointFormatError(
            f"{where}: shape {list(shape)} of {code} needs {needed} bytes, its offsets {list(offsets)} span "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, shape, offsets[0]), offsets[1]


def _in_pairs(where: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape or shape[-1] % 2:
        raise CheckpointFormatError(f"{where}: elements of {_PACKED} come in pairs, which the shape {list(shape)} cuts")
    return (*shape[:-1], shape[-1] // 2)


def _counts(value: object) -> tuple[int, ...] | None:
    """A list of whole numbers that a file could mean; None for anything else, such as a negative or `true`."""
    if not isinstance(value, list):
        return None
    numbers = cast("list[object]", value)
    if all(type(number) is int and 0 <= number <= _LARGEST_COUNT for number in numbers):
        return tuple(cast("list[int]", numbers))
    return None


def _short(value: object) -> str:
    """What a stranger wrote, for a message that people read."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"


def _check_gapless(path: Path, placed: list[tuple[TensorEntry, int]], data_nbytes: int) -> None:
    end = 0
    for tensor, tensor_end in placed:
        if tensor.offset != end:
            trouble = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointFormatError(
                f"tensor {_short(tensor.name)} in {path} {trouble}: it begins at byte {tensor.offset}, not {end}"
            )
        end = tensor_end
    if end > data_nbytes:
        raise CheckpointFormatError(
            f"{path} is truncated: its tensors need {end} bytes of data, {data_nbytes} are there; copy it again"
        )
    if end < data_nbytes:
        raise CheckpointFormatError(f"{path} holds {data_nbytes - end} bytes of data that no tensor claims")
