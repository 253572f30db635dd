"""Checkpoints by their shapes, and catalogs of them as ranks would gather: nothing of it lies in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from workloads import WORKLOADS

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.dtypes import item_size
from checkpoint_engine.planning.buckets import align_up
from checkpoint_engine.source.filling import SEGMENT_TARGET

__all__ = ["MODELS", "Shape", "catalog_of"]

_SMALLEST_SEGMENT = 1 << 30
_SEGMENTS = 16


class Shape(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * item_size(self.dtype)


def _shapes(name: str) -> list[Shape]:
    return [Shape(tensor.name, tensor.dtype, tensor.shape) for tensor in WORKLOADS[name]()]


MODELS = {name: lambda name=name: _shapes(name) for name in WORKLOADS}
"""Makes the tensors of each."""


def catalog_of(shapes: Sequence[Shape], ranks: int, hosts: int = 1, *, by: str = "count") -> Catalog:
    """Every rank holds a contiguous share, alike in number of tensors (`count`), or in bytes (`bytes`)."""
    shares: list[list[Shape]] = [[] for _ in range(ranks)]
    total, before = sum(shape.nbytes for shape in shapes), 0
    for index, shape in enumerate(shapes):
        part = index // -(-len(shapes) // ranks) if by == "count" else before * ranks // total
        shares[part].append(shape)
        before += shape.nbytes
    per_host = ranks // hosts
    return Catalog(
        "simulated",
        tuple(
            Holding(
                rank,
                f"host{rank // per_host}",
                f"GPU-{rank}",
                tuple(_segments(share)),
                p2p_address=f"host{rank // per_host}:{rank}",
                rdma_device=f"card{rank}",
                generation=1,
            )
            for rank, share in enumerate(shares)
        ),
    )


def _segments(share: Sequence[Shape]) -> Iterator[SegmentEntry]:
    """As many bytes in each as `register_checkpoint` would put there."""
    needed = sum(align_up(shape.nbytes) for shape in share)
    target = min(SEGMENT_TARGET, max(_SMALLEST_SEGMENT, needed // _SEGMENTS))
    entries, offset = list[TensorEntry](), 0
    for shape in share:
        if entries and offset + shape.nbytes > target:
            yield SegmentEntry(offset, tuple(entries))
            entries, offset = [], 0
        entries.append(TensorEntry(shape.name, shape.dtype, shape.shape, offset))
        offset += align_up(shape.nbytes)
    if entries:
        yield SegmentEntry(offset, tuple(entries))
