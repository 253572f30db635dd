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
from checkpoint_engine.host.segment import Segment
from checkpoint_engine.transfer.offers import Offer, make_offer, open_lent, this_host

logger = logging.getLogger(__name__)

_WORD = 8


class Gate:
    """One rank's side, for one update."""

    def __init__(self) -> None:
        self._own = Segment.create(mmap.PAGESIZE)
        self._others: list[Segment] = []
        self.offer = make_offer([self._own])

    def meet(self, offers: Mapping[int, Offer]) -> None:
        """Learns where the other ranks count; those of other hosts, or that cannot be looked at, are not waited for."""
        for rank, offer in offers.items():
            if offer.host != this_host():
                continue
            try:
                descriptor = open_lent(rank, offer, offer.segments[0])
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
