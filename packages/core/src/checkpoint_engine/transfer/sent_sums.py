"""Checksums of the tensors that a rank sends, taken where it reads them; workers compare them with what arrives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import msgspec
import torch

from checkpoint_engine.errors import RankError
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.reload.proof import Checksums, NumberedSums

__all__ = ["AfterLoading", "SentSums"]


class AfterLoading(msgspec.Struct, frozen=True):
    """What a rank tells the others once its workers have loaded everything."""

    can_change: bool = False
    """Whether it must look once more at what it sent."""
    sums: dict[int, int] = {}
    """Number of a tensor in the plan -> its checksum; of those that this rank sent."""


class SentSums:
    """Those of one update on one rank. Tensors are numbered in the order of the plan."""

    def __init__(self, plan: BucketPlan) -> None:
        """Begins without any."""
        self._plan = plan
        self._first = [0, *accumulate(len(bucket.tensors) for bucket in plan.buckets)]
        self._sums = NumberedSums(Checksums())

    def take(self, index: int, data: torch.Tensor) -> None:
        """Those of one bucket, which lies in `data`, 1-D uint8."""
        bucket, first = self._plan.buckets[index], self._first[index]
        self._sums.take(
            (first + number, data[tensor.offset - bucket.start :][: tensor.nbytes])
            for number, tensor in enumerate(bucket.tensors)
        )

    def taken(self) -> dict[int, int]:
        """Number -> checksum."""
        return dict(self._sums.known())

    def united(self, ranks: Sequence[AfterLoading]) -> tuple[int, ...]:
        """Those of all tensors, in order.

        Raises:
            RankError: a rank took none of what it sent.
        """
        found: dict[int, int] = {}
        for rank in ranks:
            found |= rank.sums
        if len(found) < self._first[-1]:
            raise RankError(
                f"{self._first[-1] - len(found)} of {self._first[-1]} tensors were sent without checksums: set "
                "CHECKPOINT_ENGINE_CHECKSUM alike on all ranks"
            )
        return tuple(found[number] for number in range(self._first[-1]))
