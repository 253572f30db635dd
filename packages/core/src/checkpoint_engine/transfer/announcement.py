"""The plan of an update and what workers are told of it, cached: the next checkpoint mostly lies like the last."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.link.messages import TensorSlice, encode_buckets, name_of_layout
from checkpoint_engine.planning.buckets import BucketPlan, plan_buckets

__all__ = ["Announcement", "PlanCache"]


@dataclass(frozen=True)
class Announcement:
    """What a worker is told of a plan: the tensors of each bucket, and a name for all of that."""

    buckets: msgspec.Raw
    layout: str
    nbytes: int
    """Bytes of the tensors."""
    tensors: int
    """How many they are, each counted once, in however many shards it comes."""

    @classmethod
    def of(cls, plan: BucketPlan) -> Announcement:
        """Writes it down."""
        buckets = encode_buckets(
            tuple(TensorSlice(t.name, t.dtype, t.shape, t.offset - bucket.start, t.shard) for t in bucket.tensors)
            for bucket in plan.buckets
        )
        nbytes = sum(tensor.nbytes for bucket in plan.buckets for tensor in bucket.tensors)
        tensors = len({tensor.name for bucket in plan.buckets for tensor in bucket.tensors})
        return cls(buckets, name_of_layout(buckets), nbytes, tensors)


class PlanCache:
    """Remembers the last plan, and the last announcement."""

    def __init__(self) -> None:
        self._planned: tuple[tuple[object, int], BucketPlan] | None = None
        self._announced: tuple[BucketPlan, Announcement] | None = None

    def plan(self, catalog: Catalog, bucket_size: int) -> BucketPlan:
        """The buckets of a checkpoint whose ranks all send what they hold."""
        key = (tuple((holding.rank, holding.segments) for holding in catalog.holdings), bucket_size)
        if self._planned is None or self._planned[0] != key:
            self._planned = key, plan_buckets(catalog, bucket_size)
        return self._planned[1]

    def announce(self, plan: BucketPlan) -> Announcement:
        """What workers are told of a plan."""
        if self._announced is None or self._announced[0] is not plan:
            self._announced = plan, Announcement.of(plan)
        return self._announced[1]
