"""Cuts a catalog into buckets.

A bucket is one contiguous range of one segment, so bringing it to a device is a single copy. Tensors are never
split. The result is a pure function of the catalog and the bucket size: every rank computes the same plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import msgspec

from checkpoint_engine.catalog import Catalog, Holding, TensorEntry
from checkpoint_engine.errors import TensorTooLargeError
from checkpoint_engine.planning.copies import choose_holders

__all__ = ["ALIGNMENT", "Bucket", "BucketPlan", "align_down", "align_up", "largest_bucket_needed", "plan_buckets"]

ALIGNMENT = 256
"""Bytes; device copies and vectorised kernels like addresses that are multiples of this."""

_WIDEST_GAP = 1 << 20
"""Bytes of host memory that travel for nothing rather than another bucket: where some tensors are left out."""


def align_up(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def align_down(nbytes: int) -> int:
    """The multiple of `ALIGNMENT` at or below."""
    return nbytes // ALIGNMENT * ALIGNMENT


class Bucket(msgspec.Struct, frozen=True):
    """Bytes `start` to `start + nbytes` of the owner's segment, and the tensors in them.

    `tensors` keep their offset in the segment; in the bucket a tensor lies at `tensor.offset - start`.
    """

    owner: int
    segment: int
    start: int
    nbytes: int
    tensors: tuple[TensorEntry, ...]


class BucketPlan(msgspec.Struct, frozen=True):
    """The buckets of one update in the order in which they are sent.

    `bucket_size` is the most that several tensors fill together; a tensor larger than that has a bucket of its own.
    """

    bucket_size: int
    buckets: tuple[Bucket, ...]

    @property
    def largest(self) -> int:
        """Bytes of the largest bucket."""
        return max((bucket.nbytes for bucket in self.buckets), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that travel, padding between tensors included."""
        return sum(bucket.nbytes for bucket in self.buckets)


def plan_buckets(catalog: Catalog, bucket_size: int, *, largest_allowed: int | None = None) -> BucketPlan:
    """Cuts every segment into buckets and lets the owners take turns; what several hold is in one bucket only.

    Args:
        catalog: What is to be sent.
        bucket_size: Bytes of a bucket; a tensor larger than that gets a bucket of its own.
        largest_allowed: Bytes that no bucket may exceed; no bound if None.

    Raises:
        TensorTooLargeError: a tensor needs a bucket larger than `largest_allowed`.
    """
    size = align_up(bucket_size)
    catalog = choose_holders(catalog)
    largest_bucket_needed(catalog, largest_allowed)
    per_owner = [list(_cut_holding(holding, size)) for holding in catalog.holdings]
    # Owners take turns so that all of them bring buckets to their devices at the same time.
    in_turn = tuple(bucket for turn in zip_longest(*per_owner) for bucket in turn if bucket is not None)
    return BucketPlan(bucket_size=size, buckets=_tensor_by_tensor(in_turn))


def largest_bucket_needed(catalog: Catalog, largest_allowed: int | None = None) -> int:
    """Bytes of the smallest bucket that can hold any tensor of the catalog.

    Raises:
        TensorTooLargeError: that is more than `largest_allowed`.
    """
    needed, largest = 0, None
    for tensor in catalog.tensors():
        span = align_up(tensor.offset + tensor.nbytes) - align_down(tensor.offset)
        if span > needed:
            needed, largest = span, tensor
    if largest is not None and largest_allowed is not None and needed > largest_allowed:
        raise TensorTooLargeError(
            f"tensor {largest.name!r} needs a bucket of {needed} bytes, at most {largest_allowed} are allowed; "
            "raise PS_MAX_BUCKET_SIZE_GB or free device memory"
        )
    return needed


def _tensor_by_tensor(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Has buckets that hold shards of one tensor follow each other, so that few tensors are in the making at a time."""
    holding: dict[str, list[int]] = {}
    for index, bucket in enumerate(buckets):
        for tensor in bucket.tensors:
            if tensor.shard is not None:
                holding.setdefault(tensor.name, []).append(index)
    ordered: dict[int, None] = {}
    for first in range(len(buckets)):
        queue = deque([first])
        while queue:
            index = queue.popleft()
            if index not in ordered:
                ordered[index] = None
                queue.extend(other for t in buckets[index].tensors if t.shard for other in holding.pop(t.name, ()))
    return tuple(buckets[index] for index in ordered)


def _cut_holding(holding: Holding, bucket_size: int) -> Iterator[Bucket]:
    for index, segment in enumerate(holding.segments):
        # A trainer's tensors lie in thousands of allocations: a bucket for each would cost more than their bytes.
        widest_gap = bucket_size if segment.kind == "device" else _WIDEST_GAP
        tensors: list[TensorEntry] = []
        start = end = 0
        for tensor in segment.tensors:
            tensor_end = align_up(tensor.offset + tensor.nbytes)
            if tensors and (tensor_end - start > bucket_size or tensor.offset - end > widest_gap):
                yield Bucket(holding.rank, index, start, end - start, tuple(tensors))
                tensors = []
            if not tensors:
                start = align_down(tensor.offset)
            tensors.append(tensor)
            end = min(tensor_end, segment.nbytes)
        if tensors:
            yield Bucket(holding.rank, index, start, end - start, tuple(tensors))
