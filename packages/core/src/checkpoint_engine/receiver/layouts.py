"""The layouts of buckets that a process has been told of: the next update mostly brings the same tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from checkpoint_engine.boxes import TensorBox, find_box_fault
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import LinkError
from checkpoint_engine.link.messages import Begin, TensorSlice, decode_buckets, name_of_layout

__all__ = ["LayoutCache", "ReceivedBucket", "UpdateLayout"]

_MOST = 2
"""Layouts in a cache: of a model and, where its checkpoints come apart, of another."""


class ReceivedBucket:
    """The tensors of a bucket, wherever it lies; the very same object in every update of its layout."""

    def __init__(self, entries: Sequence[TensorSlice]) -> None:
        """Works out what is asked for each time that it comes.

        Raises:
            LinkError: a dtype is unknown, or a size negative.
        """
        self.entries = entries
        self.names = tuple(entry.name for entry in entries)
        self.sharded = any(entry.shard is not None for entry in entries)
        """Whether a tensor of it comes in other buckets too."""
        items = [torch_dtype(entry.dtype).itemsize for entry in entries]
        sizes = [math.prod(entry.shape) * item for entry, item in zip(entries, items, strict=True)]
        if any(size < 0 for entry in entries for size in entry.shape):
            raise LinkError("the parameter server announces a tensor of negative size")
        self.nbytes = sum(sizes)
        self.begin = min((entry.offset for entry in entries), default=0)
        self.end = max((entry.offset + size for entry, size in zip(entries, sizes, strict=True)), default=0)
        aligned = all(entry.offset % item == 0 for entry, item in zip(entries, items, strict=True))
        self.alignment = max(items, default=1) if aligned else 0
        """A bucket at a multiple of it has all tensors where their dtypes may lie; 0: there is no such place."""

    def fits(self, offset: int, nbytes: int) -> bool:
        """Whether it can lie `offset` bytes into so many bytes of memory."""
        return offset + self.begin >= 0 and offset + self.end <= nbytes


@dataclass(frozen=True)
class UpdateLayout:
    """What an update brings, and in which buckets."""

    name: str
    buckets: tuple[ReceivedBucket, ...]
    tensors: Mapping[str, TensorSpec]
    """By name; the very same object in every update of this layout."""
    nbytes: int
    boxes: Mapping[str, int]
    """By name, in how many shards a tensor comes, where it does not come as a whole."""


class LayoutCache:
    """The latest layouts; any number of threads may use it."""

    def __init__(self) -> None:
        self._layouts: dict[str, UpdateLayout] = {}
        self._lock = threading.Lock()

    def snapshot(self) -> dict[str, UpdateLayout]:
        """By name, those that need not be sent again."""
        with self._lock:
            return dict(self._layouts)

    def layout_of(self, begin: Begin, offered: Mapping[str, UpdateLayout]) -> UpdateLayout:
        """What an update announces to a worker that said that it has `offered`.

        Raises:
            LinkError: it makes no sense, or refers to what was not offered.
        """
        if begin.layout and begin.layout not in offered:
            raise LinkError(f"the parameter server refers to layout {begin.layout}, which this worker does not know")
        name = begin.layout or name_of_layout(begin.buckets)
        layout = offered.get(name) or _read(name, begin)
        with self._lock:
            self._layouts.pop(name, None)
            self._layouts[name] = layout
            while len(self._layouts) > _MOST:
                del self._layouts[next(iter(self._layouts))]
        return layout


def _read(name: str, begin: Begin) -> UpdateLayout:
    try:
        buckets = tuple(map(ReceivedBucket, decode_buckets(begin.buckets)))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LinkError(f"the parameter server announces no buckets: {error}") from error
    entries = [entry for bucket in buckets for entry in bucket.entries]
    tensors = {entry.name: TensorSpec(torch_dtype(entry.dtype), _whole_of(entry)) for entry in entries}
    shards: dict[str, list[TensorSlice]] = {}
    for entry in entries:
        if entry.shard is not None:
            shards.setdefault(entry.name, []).append(entry)
    if len(tensors) - len(shards) < sum(entry.shard is None for entry in entries):
        raise LinkError("the parameter server announces a tensor twice")
    for tensor, found in shards.items():
        _check_shards(tensor, tensors[tensor], found)
    boxes = {tensor: len(found) for tensor, found in shards.items()}
    return UpdateLayout(name, buckets, tensors, sum(bucket.nbytes for bucket in buckets), boxes)


def _whole_of(entry: TensorSlice) -> tuple[int, ...]:
    return entry.shape if entry.shard is None else entry.shard.whole


def _check_shards(name: str, spec: TensorSpec, shards: Sequence[TensorSlice]) -> None:
    if any((torch_dtype(shard.dtype), _whole_of(shard)) != (spec.dtype, spec.shape) for shard in shards):
        raise LinkError(f"the parameter server announces shards of tensor {name!r} that do not belong together")
    boxes = tuple(TensorBox(shard.shard.begin, shard.shape) for shard in shards if shard.shard is not None)
    fault = find_box_fault(spec.shape, boxes)
    if fault is not None:
        raise LinkError(
            f"the shards that the parameter server announces of tensor {name!r} do not make it up: {fault.kind} at "
            f"{fault.box} of {list(spec.shape)}"
        )
