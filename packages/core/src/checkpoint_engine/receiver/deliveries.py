"""A bucket where it lies in mapped memory: its tensors as a sink is given them."""

from __future__ import annotations

import math
from functools import partial
from weakref import WeakKeyDictionary

import torch

from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.device import Mapped
from checkpoint_engine.device.imported_blocks import ImportedBlocks
from checkpoint_engine.device.memory import Memory
from checkpoint_engine.device.segments import Part
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import LinkError
from checkpoint_engine.link.messages import Load
from checkpoint_engine.receiver.block_views import view_blocks
from checkpoint_engine.receiver.layouts import ReceivedBucket
from checkpoint_engine.receiver.scattered import KnownDeliveries
from checkpoint_engine.reload.regions import contiguous

__all__ = ["Deliveries", "DeliveryCache", "view_bucket"]

Deliveries = dict[tuple[str, Load], Delivery]
"""Layout, and what was said of the bucket -> what was made of it."""


class DeliveryCache:
    """Deliveries out of memory that stays mapped after its update, for as long as that does.

    Whoever has worked out what to do with one is given the very same object again.
    """

    def __init__(self) -> None:
        self._of_memory: WeakKeyDictionary[Mapped, Deliveries] = WeakKeyDictionary()
        self._of_shards: WeakKeyDictionary[Mapped, KnownDeliveries] = WeakKeyDictionary()

    def of(self, mapped: Mapped, memory: Memory) -> Deliveries:
        """Those out of this memory; of memory that goes with its update, none, and none is remembered."""
        return self._of_memory.setdefault(mapped, {}) if memory.lease else {}

    def of_shards(self, mapped: Mapped, memory: Memory) -> KnownDeliveries:
        """Likewise, of tensors that come in shards."""
        return self._of_shards.setdefault(mapped, {}) if memory.lease else {}


def view_bucket(memory: Part, bucket: ReceivedBucket, offset: int, *, stays: object = False) -> Delivery:
    """The tensors of a bucket that lies `offset` bytes into memory, which `stays` or does not.

    A file used in place may hold tensors at addresses that their dtype does not allow; those are copied out.

    Raises:
        LinkError: a tensor would leave the memory.
    """
    if isinstance(memory, ImportedBlocks):
        return view_blocks(memory, bucket, offset, stays=stays)
    if not bucket.fits(offset, memory.numel()):
        raise LinkError(
            f"a bucket of {len(bucket.names)} tensors ({', '.join(bucket.names[:1])} …) at byte {offset} leaves the "
            f"staging memory of {memory.numel()} bytes"
        )
    aligned = bucket.alignment > 0 and offset % bucket.alignment == 0
    return Delivery(
        bucket.names,
        bucket.nbytes,
        partial(_tensors_in, memory, bucket, offset),
        (memory[offset + bucket.begin :],),
        bucket=bucket if aligned else None,
        stays=bool(stays) and aligned,
    )


def _tensors_in(staging: torch.Tensor, bucket: ReceivedBucket, offset: int) -> list[tuple[str, torch.Tensor]]:
    views: dict[str, torch.Tensor] = {}
    result: list[tuple[str, torch.Tensor]] = []
    for entry in bucket.entries:
        begin, dtype = offset + entry.offset, torch_dtype(entry.dtype)
        view = views.get(entry.dtype)
        if view is None:
            # One view of all of it for each dtype: a thousand small tensors then cost one operation each.
            views[entry.dtype] = view = staging[: staging.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if begin % dtype.itemsize:
            end = begin + math.prod(entry.shape) * dtype.itemsize
            tensor = staging[begin:end].clone().view(dtype).view(entry.shape)
        else:
            first = int(view.storage_offset()) + begin // dtype.itemsize
            tensor = view.as_strided(entry.shape, contiguous(entry.shape), first)
        result.append((entry.name, tensor))
    return result
