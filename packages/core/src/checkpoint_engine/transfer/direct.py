"""Direct: each engine worker takes its own slices out of host memory; nothing is staged and nothing broadcast.

The ranks of one host lend their segments to the worker of each of them, as file descriptors (see `offers`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device.base import Memory
from checkpoint_engine.link.messages import SharedSegments
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.transfer.offers import Offer, open_lent
from checkpoint_engine.transfer.remote import RemoteBuckets
from checkpoint_engine.transfer.report import Progress, StageClock
from checkpoint_engine.transfer.worker_link import WorkerLink

MOST_SEGMENTS = 200
"""File descriptors that one message may carry, with room to spare (the kernel's limit is 253)."""

RING = -1
"""Stands for a rank where the ring's number is asked for."""

_BUCKETS_AHEAD = 8
"""Buckets that a worker is told of before it has answered; more would only fill the socket."""


def find_obstacle(offers: Sequence[Offer], catalog: Catalog) -> str:
    """What keeps these ranks from a direct update; empty if nothing does. Alike on all ranks.

    Between hosts, ranks fetch what their workers lack; `catalog` says whether the others' memory can be read.
    """
    silent = [
        holding.rank
        for holding in catalog.holdings
        if any(segment.tensors for segment in holding.segments) and not (holding.p2p_address and holding.generation)
    ]
    for rank, offer in enumerate(offers):
        if offer.obstacle:
            return f"rank {rank}: {offer.obstacle}"
        if offer.host != offers[0].host and silent:
            return (
                f"ranks 0 and {rank} are on different hosts, or in containers that do not see each other's processes, "
                f"and rank {silent[0]} does not let others read its memory (CHECKPOINT_ENGINE_P2P=1, or --share)"
            )
    of_host: dict[str, int] = {}
    for offer in offers:
        of_host[offer.host] = of_host.get(offer.host, 1) + len(offer.segments)
    count = max(of_host.values(), default=0)
    return f"{count} segments are more than the {MOST_SEGMENTS} that can be lent" if count > MOST_SEGMENTS else ""


class LentSegments:
    """All segments of all ranks of this host, ready to go over a link; behaves like staging memory."""

    def __init__(self, offers: Mapping[int, Offer]) -> None:
        """Opens them; `offers` are by rank, and by `RING` what others' buckets are fetched into.

        Raises:
            RankError: another rank's memory cannot be opened.
        """
        opened: list[int] = []
        self.descriptors: tuple[int, ...] = ()
        self._numbers: dict[tuple[int, int], int] = {}
        # In the order in which workers will need them: the ranks take turns, and each sends segment by segment.
        places = sorted((index, rank) for rank, offer in offers.items() for index in range(len(offer.segments)))
        try:
            for index, rank in places:
                self._numbers[rank, index] = len(opened)
                opened.append(open_lent(rank, offers[rank], offers[rank].segments[index]))
        finally:
            self.descriptors = tuple(opened)
            if len(self._numbers) > len(opened):
                self.close()
        sizes = tuple(offers[rank].segments[index].nbytes for index, rank in places)
        self.memory: Memory = SharedSegments(sizes, _lease(offers.values()))

    def number(self, rank: int, segment: int) -> int:
        """Which of the lent segments a rank's own segment is."""
        return self._numbers[rank, segment]

    def close(self) -> None:
        """Closes this process's descriptors of them."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


class DirectTransfer:
    """One rank's part: tells its workers where every bucket lies, and waits until they have taken them."""

    def __init__(
        self,
        *,
        plan: BucketPlan,
        lent: LentSegments,
        links: Sequence[WorkerLink],
        remote: RemoteBuckets | None,
        cancel: Cancel,
        progress: Progress,
        clock: StageClock,
    ) -> None:
        self._plan = plan
        self._lent = lent
        self._links = links
        self._remote = remote
        self._sent: list[int] = []
        """Buckets in the order in which the workers were told of them."""
        self._released = 0
        self._cancel = cancel
        self._progress = progress
        self._clock = clock

    def run(self) -> None:
        """Returns once the workers have taken everything.

        Raises:
            CheckpointEngineError: a worker failed, another rank did, or the deadline is over.
        """
        away = list(self._remote.away) if self._remote is not None else []
        near = [index for index in range(len(self._plan.buckets)) if index not in set(away)]
        while away or near:
            self._cancel.check()
            self._settle(len(self._sent) - _BUCKETS_AHEAD)
            # Whatever comes from other hosts is passed on as it comes; in between, what lies here.
            if away and self._remote is not None and (not near or self._remote.source.ready(away[0])):
                self._pass_on(self._remote, away.pop(0))
            else:
                self._send(near.pop(0))
        self._settle(len(self._sent))
        self._clock.add("load", max(sum(seconds for _, seconds in link.loads.values()) for link in self._links))
        if self._clock.trace is not None:
            for link in self._links:
                self._clock.trace.spans += link.spans(self._plan)
            self._clock.trace.spans += self._remote.spans() if self._remote is not None else []

    def _send(self, index: int) -> None:
        bucket = self._plan.buckets[index]
        for link in self._links:
            link.load(index, bucket.start, self._lent.number(bucket.owner, bucket.segment))
        self._sent.append(index)

    def _pass_on(self, remote: RemoteBuckets, index: int) -> None:
        if not remote.source.ready(index):
            self._settle(len(self._sent))  # it may wait for memory that the workers hold
        place = remote.place_of(index)
        for link in self._links:
            link.load(index, place, self._lent.number(RING, 0), again=True)
        self._sent.append(index)

    def _settle(self, count: int) -> None:
        """Waits until all workers have loaded so many of the buckets, and gives back what those were in."""
        for link in self._links:
            link.wait_until_loaded(count)
        done = self._sent[self._released : min(len(link.loads) for link in self._links)]
        for index in done:
            self._progress.bytes_done += self._plan.buckets[index].nbytes
            if self._remote is not None and index in self._remote.away:
                self._remote.source.release(index)
        self._released += len(done)
        self._progress.buckets_done = self._released


def _lease(offers: Iterable[Offer]) -> str:
    """Names these very segments: an inode number is not given out again while somebody holds the inode."""
    digest = hashlib.sha256()
    for offer in offers:
        digest.update(repr((offer.host, [(segment.inode, segment.nbytes) for segment in offer.segments])).encode())
    return digest.hexdigest()[:32]
