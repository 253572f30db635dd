"""The tensors of a bucket that lie where a trainer has them: in allocations of its own, mapped here."""

from __future__ import annotations

import math
from functools import partial

import torch

from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.device.imported_blocks import ImportedBlocks
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import LinkError
from checkpoint_engine.receiver.layouts import ReceivedBucket
from checkpoint_engine.reload.regions import contiguous

__all__ = ["view_blocks"]


def view_blocks(segment: ImportedBlocks, bucket: ReceivedBucket, offset: int, *, stays: object = False) -> Delivery:
    """The tensors of a bucket that begins `offset` bytes into a segment, which `stays` or does not.

    Raises:
        LinkError: a tensor lies in no allocation of the segment, or where its dtype may not.
    """
    located: list[tuple[torch.Tensor, int]] = []
    blocks: dict[int, torch.Tensor] = {}
    for entry in bucket.entries:
        item = torch_dtype(entry.dtype).itemsize
        block, begin = segment.locate(offset + entry.offset, math.prod(entry.shape) * item)
        if (block.data_ptr() + begin) % item:
            raise LinkError(f"tensor {entry.name!r} lies at an address that its dtype does not allow")
        blocks[id(block)] = block
        located.append((block, begin))
    view, known = partial(_views, bucket, located), bucket if stays else None
    return Delivery(bucket.names, bucket.nbytes, view, tuple(blocks.values()), bucket=known, stays=bool(stays))


def _views(bucket: ReceivedBucket, located: list[tuple[torch.Tensor, int]]) -> list[tuple[str, torch.Tensor]]:
    typed: dict[tuple[int, str], torch.Tensor] = {}
    views: list[tuple[str, torch.Tensor]] = []
    for entry, (block, begin) in zip(bucket.entries, located, strict=True):
        dtype = torch_dtype(entry.dtype)
        whole = typed.get((id(block), entry.dtype))
        if whole is None:
            # One view of a block for each dtype: a thousand small tensors then cost one operation each.
            whole = block[: block.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            typed[id(block), entry.dtype] = whole
        first = int(whole.storage_offset()) + begin // dtype.itemsize
        views.append((entry.name, whole.as_strided(entry.shape, contiguous(entry.shape), first)))
    return views
