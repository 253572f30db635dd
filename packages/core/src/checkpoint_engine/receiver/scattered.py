"""Tensors that come in shards: from wherever those lie, they are delivered once they are all there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from checkpoint_engine.boxes import TensorBox
from checkpoint_engine.contract.delivery import Delivery, Pairs, Place
from checkpoint_engine.device.imported_blocks import ImportedBlocks
from checkpoint_engine.device.segments import Part
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import DeviceMemoryError, LinkError
from checkpoint_engine.link.messages import Load, TensorSlice
from checkpoint_engine.receiver.layouts import ReceivedBucket, UpdateLayout

__all__ = ["KnownDeliveries", "ScatteredDelivery", "ShardAssembly"]


@dataclass(frozen=True)
class _HeldShard:
    """Memory that a shard, or a whole tensor, begins `at` bytes into."""

    entry: TensorSlice
    block: torch.Tensor
    at: int
    stays: bool

    @property
    def box(self) -> TensorBox | None:
        """What it is of its tensor; None for all of it."""
        return None if self.entry.shard is None else TensorBox(self.entry.shard.begin, self.entry.shape)

    def view(self) -> torch.Tensor:
        """Its elements."""
        dtype = torch_dtype(self.entry.dtype)
        nbytes = math.prod(self.entry.shape) * dtype.itemsize
        return self.block[self.at : self.at + nbytes].view(dtype).view(self.entry.shape)


class ScatteredDelivery(Delivery):
    """Tensors of which every one lies in boxes. Whoever asks for one gets it put together anew.

    Plans copy out of the boxes instead.
    """

    def __init__(self, tensors: Sequence[Sequence[_HeldShard]], device: torch.device) -> None:
        """Takes the shards of each tensor; `device` is where they are put together."""
        self._shards = tuple(map(tuple, tensors))
        self._device = device
        blocks = {id(shard.block): shard.block for shards in self._shards for shard in shards}
        self._numbers = {identity: number for number, identity in enumerate(blocks)}
        stays = all(shard.stays for shards in self._shards for shard in shards)
        super().__init__(
            tuple(shards[0].entry.name for shards in self._shards),
            sum(shard.view().nbytes for shards in self._shards for shard in shards),
            lambda: list(self),
            tuple(blocks.values()),
            bucket=self if stays else None,
            stays=stays,
        )

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return (self._pair(number) for number in range(len(self._shards)))

    @overload
    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> tuple[str, torch.Tensor] | Pairs:
        if isinstance(index, slice):
            return [self._pair(number) for number in range(len(self._shards))[index]]
        return self._pair(index)

    def places(self) -> Iterator[tuple[Place, ...]]:
        """See `Delivery`."""
        for shards in self._shards:
            yield tuple(
                Place(self._numbers[id(shard.block)], shard.at, _whole_of(shard.entry), shard.box) for shard in shards
            )

    def part(self, numbers: Sequence[int]) -> ScatteredDelivery:
        """See `Delivery`; nothing is put together for it."""
        return ScatteredDelivery([self._shards[number] for number in numbers], self._device)

    def _pair(self, number: int) -> tuple[str, torch.Tensor]:
        shards = self._shards[number]
        if shards[0].box is None:
            return self.names[number], shards[0].view()
        whole = _whole_of(shards[0].entry)
        try:
            tensor = torch.empty(whole, dtype=torch_dtype(shards[0].entry.dtype), device=self._device)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"no room on {self._device} to put together tensor {self.names[number]!r} {list(whole)} out of its "
                f"{len(shards)} shards; leave the engine less of the device, or update directly, by reload plan"
            ) from error
        for shard in shards:
            if shard.box is not None:
                tensor[shard.box.slices].copy_(shard.view(), non_blocking=True)
        return self.names[number], tensor


KnownDeliveries = dict[tuple[str, tuple[Load, ...]], ScatteredDelivery | None]
"""Layout, and all that was said of its buckets so far -> what the last one of them completed."""


@dataclass(frozen=True)
class _Seen:
    bucket: ReceivedBucket
    memory: Part
    load: Load
    stays: bool


class ShardAssembly:
    """The shards of one update, until their tensors are whole."""

    def __init__(self, layout: UpdateLayout, device: torch.device, known: KnownDeliveries) -> None:
        """Begins; `known` are deliveries out of memory that has stayed mapped since an earlier update."""
        self._layout = layout
        self._device = device
        self._known = known
        self._loads: tuple[Load, ...] = ()
        self._unread: list[_Seen] = []
        """Buckets whose deliveries were known: they are only looked at if one comes that is not."""
        self._waiting: dict[str, list[_HeldShard]] = {}

    def add(self, bucket: ReceivedBucket, memory: Part, load: Load, *, stays: bool) -> ScatteredDelivery | None:
        """The tensors that this bucket completes; None if it completes none.

        What does not stay is copied out: its memory is used again.

        Raises:
            LinkError: a tensor would leave the memory.
        """
        self._loads = (*self._loads, load)
        self._unread.append(_Seen(bucket, memory, load, stays))
        key = self._layout.name, self._loads
        if stays and key in self._known:
            return self._known[key]
        delivery = self._read()
        if stays and (delivery is None or delivery.stays):
            self._known[key] = delivery
        return delivery

    def _read(self) -> ScatteredDelivery | None:
        complete: list[list[_HeldShard]] = []
        for seen in self._unread:
            complete = [shards for entry in seen.bucket.entries if (shards := self._take(seen, entry))]
        self._unread.clear()
        return ScatteredDelivery(complete, self._device) if complete else None

    def _take(self, seen: _Seen, entry: TensorSlice) -> list[_HeldShard]:
        """All shards of a tensor, if this is the last of them."""
        shards = self._waiting.setdefault(entry.name, [])
        shards.append(self._hold(seen, entry))
        return self._waiting.pop(entry.name) if len(shards) == self._layout.boxes.get(entry.name, 1) else []

    def _hold(self, seen: _Seen, entry: TensorSlice) -> _HeldShard:
        item = torch_dtype(entry.dtype).itemsize
        begin, nbytes = seen.load.offset + entry.offset, math.prod(entry.shape) * item
        if isinstance(seen.memory, ImportedBlocks):
            block, at = seen.memory.locate(begin, nbytes)
        else:
            block, at = seen.memory, begin
            if not 0 <= begin <= begin + nbytes <= block.numel():
                raise LinkError(f"tensor {entry.name!r} at byte {begin} leaves the memory of {block.numel()} bytes")
        if seen.stays and (block.data_ptr() + at) % item == 0:
            return _HeldShard(entry, block, at, stays=True)
        copied = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return _HeldShard(entry, copied.copy_(block[at : at + nbytes], non_blocking=True), 0, stays=False)


def _whole_of(entry: TensorSlice) -> tuple[int, ...]:
    return entry.shape if entry.shard is None else entry.shard.whole
