"""The ranks of one host begin each broadcast together.

A rank that came early would have NCCL's kernel spin on its GPU until the last one comes, and for that long the engine
worker, which is another process, gets its GPU in slices of milliseconds only. So each rank counts, in memory that the
others see, the broadcasts that it is ready for. Nothing but speed hangs on what is read there.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping

from checkpoint_engine.errors import RankError
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.exports import Export, export_segments, open_exported, this_host

__all__ = ["BroadcastGate"]

logger = logging.getLogger(__name__)

_WORD = 8


class BroadcastGate:
    """One rank's side, for one update."""

    def __init__(self) -> None:
        self._own = Segment.create(mmap.PAGESIZE)
        self._others: list[Segment] = []
        self.exported = export_segments([self._own])

    def meet(self, exports: Mapping[int, Export]) -> None:
        """Learns where the other ranks count; those of other hosts, or that cannot be looked at, are not waited for."""
        for rank, export in exports.items():
            if export.host != this_host():
                continue
            try:
                descriptor = open_exported(rank, export, export.segments[0].descriptor, export.segments[0].inode)
            except RankError as error:
                logger.info("broadcasts do not wait for rank %d: %s", rank, error)
                continue
            self._others.append(Segment(descriptor, mmap.PAGESIZE))

    def passed(self, index: int) -> bool:
        """Says that this rank is ready for broadcast number `index`; returns whether all others are."""
        _count(self._own)[0] = index + 1
        return all(_count(other)[0] > index for other in self._others)

    def close(self) -> None:
        """Gives the memory up."""
        for segment in (self._own, *self._others):
            segment.close()


def _count(page: Segment) -> memoryview[int]:
    return page.buffer(0, _WORD).cast("Q")
