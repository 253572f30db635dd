"""Where in the staging memory each bucket goes, and when that is free.

Staging is used as rings: ranges are given out in the order of the buckets and wrap around at the end, so a huge
embedding and a thousand small buckets share the same memory. A rank that owns buckets fills them into one ring ahead
of time, and receives the others' into a second, so a bucket that waits for its turn never blocks one that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from checkpoint_engine.errors import DeviceMemoryError
from checkpoint_engine.planning.buckets import BucketPlan, align_down, align_up

__all__ = ["StagingLayout", "StagingRange", "choose_layout", "place_buckets"]

_BUCKETS_AHEAD = 2
"""Buckets of regular size that a ring holds: one is loaded while the next one arrives."""


class StagingRange(msgspec.Struct, frozen=True):
    """Bytes `offset` to `offset + nbytes` of the staging memory; free once bucket `after` and all before are done."""

    offset: int
    nbytes: int
    after: int | None


class StagingLayout(msgspec.Struct, frozen=True):
    """How much staging a rank has: two rings of their own size, or one that both kinds of bucket share."""

    own_nbytes: int
    received_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of staging on the device."""
        return self.own_nbytes + self.received_nbytes

    @property
    def shared(self) -> bool:
        """Whether owned and received buckets share one ring."""
        return self.received_nbytes == 0


def choose_layout(plan: BucketPlan, world_size: int, available: int) -> StagingLayout | None:
    """The best layout that fits into `available` bytes; None if not even the largest bucket does.

    Two rings let the bus and the collective work at the same time. One ring still works, bucket after bucket.
    """
    largest = align_up(plan.largest)
    ring = min(max(largest, _BUCKETS_AHEAD * plan.bucket_size), align_up(plan.nbytes))
    available = align_down(available)
    rings = 1 if world_size == 1 else 2
    if available >= rings * ring:
        return StagingLayout(ring, ring if rings == 2 else 0)  # noqa: PLR2004 - two rings
    if rings == 2 and available >= 2 * largest:  # noqa: PLR2004 - two rings
        return StagingLayout(align_down(available // 2), align_down(available // 2))
    if available >= largest:
        return StagingLayout(min(available, ring), 0)
    return None


def place_buckets(plan: BucketPlan, layout: StagingLayout, rank: int) -> tuple[StagingRange, ...]:
    """The range of every bucket of the plan in the staging memory of `rank`.

    Raises:
        DeviceMemoryError: a bucket is larger than its ring.
    """
    own = [bucket.owner == rank for bucket in plan.buckets]
    ranges: list[StagingRange | None] = [None] * len(own)
    if layout.shared:
        _fill_ring(plan, range(len(own)), 0, layout.own_nbytes, ranges)
    else:
        _fill_ring(plan, (i for i, mine in enumerate(own) if mine), 0, layout.own_nbytes, ranges)
        others = (i for i, mine in enumerate(own) if not mine)
        _fill_ring(plan, others, layout.own_nbytes, layout.received_nbytes, ranges)
    return tuple(each for each in ranges if each is not None)


def _fill_ring(
    plan: BucketPlan, members: Iterable[int], base: int, capacity: int, ranges: list[StagingRange | None]
) -> None:
    """Gives out ranges of one ring; `held` are those not yet known to be free, oldest first."""
    held: list[tuple[int, int, int]] = []  # (bucket, begin, end)
    cursor, freed = 0, None
    for index in members:
        nbytes = align_up(plan.buckets[index].nbytes)
        if plan.buckets[index].nbytes > capacity:
            raise DeviceMemoryError(f"a bucket of {nbytes} bytes does not fit into {capacity} bytes of staging")
        if cursor + plan.buckets[index].nbytes > capacity:
            cursor = 0
        begin, end = cursor, cursor + nbytes
        # Everything up to the last holder of these bytes must be done; rings are emptied in order.
        last = _last_overlap(held, begin, end)
        if last is not None:
            freed = held[last][0]
            del held[: last + 1]
        ranges[index] = StagingRange(base + begin, plan.buckets[index].nbytes, freed)
        held.append((index, begin, end))
        cursor = end


def _last_overlap(held: Sequence[tuple[int, int, int]], begin: int, end: int) -> int | None:
    overlapping = [i for i, (_, held_begin, held_end) in enumerate(held) if held_begin < end and begin < held_end]
    return overlapping[-1] if overlapping else None
