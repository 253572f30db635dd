"""Tensors that stay where they are: in memory of this process's own device, which engines' workers map."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.device.base import Device
from checkpoint_engine.device.blocks import Block, BlockTable
from checkpoint_engine.dtypes import dtype_name
from checkpoint_engine.errors import CheckpointStateError, UnsupportedTensorError
from checkpoint_engine.planning.buckets import Bucket

__all__ = ["DeviceSegment", "InPlace", "keep_in_place"]

_SHAPE: Callable[[torch.Tensor], torch.Size] = operator.attrgetter("shape")


class DeviceSegment:
    """All of a rank's tensors that lie on its device, as one segment: from the first allocation to the last.

    Most of that range is other memory, or none. Nothing is copied: whoever registered the tensors keeps them alive and
    unchanged while they are sent.
    """

    file = None
    fd = -1

    def __init__(self, device: Device, tensors: Mapping[str, torch.Tensor], blocks: Sequence[Block]) -> None:
        """Takes tensors, none of which overlaps another, and the allocations that they lie in."""
        self._device = device
        self._tensors = dict(sorted(tensors.items(), key=lambda item: item[1].data_ptr()))
        self.blocks = tuple(blocks)
        self.address = self.blocks[0].address
        self.nbytes = self.blocks[-1].address + self.blocks[-1].nbytes - self.address
        self._addresses = self._addresses_now()
        self._shapes = list(map(_SHAPE, self._tensors.values()))

    @property
    def names(self) -> Iterable[str]:
        """Of its tensors."""
        return self._tensors

    @property
    def entry(self) -> SegmentEntry:
        """What the catalog says of it; shards are labelled as if they were tensors."""
        tensors = tuple(
            TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape), address - self.address)
            for (name, tensor), address in zip(self._tensors.items(), self._addresses, strict=True)
        )
        return SegmentEntry(self.nbytes, tensors, self.address, kind="device")

    def check(self) -> None:
        """Raises if a tensor is not where it was, and waits for all work that may still write to them.

        Raises:
            CheckpointStateError: its owner has freed it or moved it.
        """
        if self._addresses_now() != self._addresses or not self._is_shaped_as_before():
            moved = next(name for name, tensor, address, shape in self._known() if _has_changed(tensor, address, shape))
            raise CheckpointStateError(
                f"tensor {moved!r} was registered in place and has been moved, reshaped or freed since; register the "
                "checkpoint again with the tensors as they are now"
            )
        self._device.synchronize_all()

    def bytes_of(self, bucket: Bucket) -> torch.Tensor:
        """The bytes of a bucket that lies here, put together on the device; what lies between tensors is left open."""
        packed = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device.torch_device)
        parts = [packed[t.offset - bucket.start :][: t.nbytes] for t in bucket.tensors]
        sources = [self._tensors[t.label].detach().view(-1).view(torch.uint8) for t in bucket.tensors]
        # Torch has no public name for many copies in one call, and its optimisers rely on this one.
        cast("Any", torch)._foreach_copy_(parts, sources)
        self._device.synchronize()
        return packed

    def holds(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are its very tensors, and where they were."""
        if tensors.keys() != self._tensors.keys() or self._addresses_now() != self._addresses:
            return False
        mine = list(map(self._tensors.__getitem__, tensors))
        return all(map(operator.is_, mine, tensors.values())) or all(map(_same_place, mine, tensors.values()))

    def close(self) -> None:
        """Lets go of the tensors."""
        self._tensors, self._addresses = {}, []
        for block in self.blocks:
            if block.descriptor >= 0:
                os.close(block.descriptor)
        self.blocks = ()

    discard = close

    # Every step asks this of all tensors: `map` takes half the time of a comprehension.

    def _addresses_now(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors.values()))

    def _is_shaped_as_before(self) -> bool:
        tensors = self._tensors.values()
        return list(map(_SHAPE, tensors)) == self._shapes and all(map(torch.Tensor.is_contiguous, tensors))

    def _known(self) -> Iterable[tuple[str, torch.Tensor, int, torch.Size]]:
        return zip(self._tensors, self._tensors.values(), self._addresses, self._shapes, strict=True)


def _has_changed(tensor: torch.Tensor, address: int, shape: torch.Size) -> bool:
    return tensor.data_ptr() != address or tensor.shape != shape or not tensor.is_contiguous()


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.dtype) == (other.data_ptr(), other.shape, other.dtype)


@dataclass(frozen=True)
class InPlace:
    """Tensors, divided into what must be copied and what can stay where it is."""

    left: Mapping[str, torch.Tensor]
    """What must be copied."""
    segment: DeviceSegment | None = None
    why: str = ""
    """What keeps the first of those that are left from staying, if it was to stay."""

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return {*self.left, *(self.segment.names if self.segment is not None else ())}


def keep_in_place(tensors: Mapping[str, torch.Tensor], device: Device) -> InPlace:
    """Divides tensors into those that workers can copy from where they lie, and the rest.

    Raises:
        UnsupportedTensorError: a tensor cannot be carried at all.
    """
    table = BlockTable(device.find_block)
    staying: dict[str, torch.Tensor] = {}
    left: dict[str, torch.Tensor] = {}
    why, start, end = "", 0, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        try:
            _require_plain(tensor, device, start, end)
            table.add(tensor)
        except UnsupportedTensorError as error:
            left[name] = tensor
            why = why or f"{name}: {error}"
            continue
        staying[name] = tensor
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    segment = DeviceSegment(device, staying, table.blocks) if staying else None
    return InPlace(left, segment, why)


def _require_plain(tensor: torch.Tensor, device: Device, start: int, end: int) -> None:
    if tensor.device != device.torch_device:
        raise UnsupportedTensorError(f"it lies on {tensor.device}, this rank's device is {device.torch_device}")
    if not tensor.is_contiguous():
        raise UnsupportedTensorError("its elements do not lie one after the other")
    if not tensor.nbytes:
        raise UnsupportedTensorError("it has no elements")
    mine = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if mine[0] < end and mine != (start, end):
        raise UnsupportedTensorError("it shares a part of its memory with another tensor")
