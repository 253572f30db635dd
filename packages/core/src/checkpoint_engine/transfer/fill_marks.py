"""How far each rank of a host has filled its segments, where the others see it: nobody reads past a rank's mark.

A mark is a number in a page that its rank shares, and only grows. Its rank raises it with a lock let go and another
taken since the last byte was written (see `Refill`); whoever has seen it tells an engine worker through the kernel,
which locks its sockets, and only that worker reads. So also processors that change the order of what they write and
read, as those of ARM do, keep this one.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.source.refill import Refill
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.exports import Export, export_segments, open_exported

__all__ = ["FillMarks"]

_WORD = 8
_TICK_SECONDS = 0.0005


class FillMarks:
    """One rank's side, for one update."""

    def __init__(self, rank: int, refill: Refill | None) -> None:
        """Begins to tell how far `refill` has come; None: all that this rank holds is there."""
        self._rank = rank
        self._refill = refill
        self._own = None if refill is None else Segment.create(mmap.PAGESIZE)
        self.exported = None if self._own is None else export_segments([self._own])
        self._others: dict[int, _Mark] = {}
        if self._refill is not None and self._own is not None:
            page = self._own
            self._refill.follow(lambda nbytes: _set(page, nbytes))

    def meet(self, ranks: Mapping[int, tuple[Export, Export]]) -> None:
        """Learns of other ranks of this host that are still filling: what they export, and where their marks are.

        Raises:
            RankError: a mark cannot be opened.
        """
        for rank, (export, mark) in ranks.items():
            descriptor = open_exported(rank, mark, mark.segments[0].descriptor, mark.segments[0].inode)
            starts = (0, *accumulate(segment.nbytes for segment in export.segments))
            self._others[rank] = _Mark(Segment(descriptor, mmap.PAGESIZE), starts)

    def wait(self, bucket: Bucket, check: Callable[[], None]) -> None:
        """Returns once a bucket is in its owner's memory; `check` raises if nobody needs it any more.

        Raises:
            CheckpointEngineError: it will never be there, or this rank's own will not, or what `check` raises.
        """
        end = bucket.start + bucket.nbytes
        other = self._others.get(bucket.owner)
        if other is not None:
            while not other.has(bucket.segment, end):
                check()
                if self._refill is not None:
                    self._refill.has_all()  # what fails here, the others wait for
                time.sleep(_TICK_SECONDS)
        elif self._refill is not None and bucket.owner == self._rank:
            self._refill.wait(bucket.segment, end, check)

    def wait_for_own(self, check: Callable[[], None]) -> None:
        """Returns once all that this rank holds is there; raises as `wait` does."""
        if self._refill is not None:
            self._refill.wait_for_all(check)

    def close(self) -> None:
        """Nobody is told any more."""
        if self._refill is not None:
            self._refill.follow(None)
        for page in (self._own, *(other.page for other in self._others.values())):
            if page is not None:
                page.close()


@dataclass(frozen=True)
class _Mark:
    """Another rank's."""

    page: Segment
    starts: tuple[int, ...]
    """Where its segments begin, as if they lay end to end."""

    def has(self, segment: int, end: int) -> bool:
        return _word(self.page)[0] >= self.starts[segment] + end


def _set(page: Segment, nbytes: int) -> None:
    _word(page)[0] = nbytes


def _word(page: Segment) -> memoryview[int]:
    """Written and read in one piece, as processors do with eight aligned bytes."""
    return page.buffer(0, _WORD).cast("Q")
