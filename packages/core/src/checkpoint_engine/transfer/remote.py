"""Direct updates across hosts: what the workers of a host need and its ranks do not hold is fetched while they copy.

It goes through a ring of host memory that the workers have mapped like the segments of their own host's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.host.p2p_store import P2PStore
from checkpoint_engine.host.segment import Segment
from checkpoint_engine.link.messages import Wanted
from checkpoint_engine.planning.buckets import BucketPlan, align_up
from checkpoint_engine.planning.peers import PeerPlan, Piece, Route
from checkpoint_engine.transfer.feeds import peers_of
from checkpoint_engine.transfer.fetching import READS_AHEAD, PeerSource
from checkpoint_engine.transfer.trace import Span

_HERE, _ELSEWHERE = 0, 1


class RingKeeper:
    """The ring of a rank; kept, because workers keep what they have mapped and registered."""

    def __init__(self, store: Callable[[], P2PStore]) -> None:
        """Takes how to open this rank's end of transfers."""
        self.store = store
        self._ring: Segment | None = None

    def take(self, nbytes: int) -> Segment:
        """A ring of at least so many bytes, into which reads can land.

        Raises:
            HostMemoryError: there is no room for it.
            MissingDependencyError: Mooncake is not installed.
        """
        if self._ring is None or self._ring.nbytes < nbytes:
            self.close()
            ring = Segment.create(nbytes)
            try:
                ring.touch(0, nbytes)
                self.store().register(ring)
            except BaseException:
                ring.close()
                raise
            self._ring = ring
        return self._ring

    def retire(self) -> None:
        """Gives the ring up after a failure: reads that are under way may still land in it."""
        if self._ring is not None:
            ring, self._ring = self._ring, None
            self.store().retire(ring)

    def close(self) -> None:
        """Frees it."""
        if self._ring is not None:
            ring, self._ring = self._ring, None
            ring.close()


class RemoteBuckets:
    """The buckets of one update that ranks of other hosts hold."""

    def __init__(self, plan: BucketPlan, catalog: Catalog, away: Sequence[int], rings: RingKeeper) -> None:
        """Makes the ring ready; nothing is fetched before `start`.

        Args:
            plan: All buckets.
            catalog: Who holds them, and how that is reached.
            away: Places of the buckets that are to be fetched, ascending.
            rings: Of this rank.

        Raises:
            HostMemoryError: there is no room for the ring.
        """
        self.away = tuple(away)
        self._plan = plan
        self._catalog = catalog
        self._rings = rings
        largest = max(align_up(plan.buckets[index].nbytes) for index in away)
        self.ring = rings.take(largest * min(READS_AHEAD, len(away)))
        self._source: PeerSource | None = None
        self.complete = False
        """Whether everything has come, and been copied."""

    def start(self, wanted: Sequence[Wanted], cancel: Cancel) -> None:
        """Begins to fetch; `wanted[i]` are the bytes that are needed of bucket `away[i]`.

        Raises:
            PeerError: a holder does not share its memory.
        """
        places = {holding.rank: place for place, holding in enumerate(self._catalog.holdings)}
        needed = dict(zip(self.away, wanted, strict=True))
        routes: list[tuple[Route, ...]] = []
        for index, bucket in enumerate(self._plan.buckets):
            ranges = ((0, bucket.nbytes),) if (found := needed.get(index, ())) is None else found
            pieces = (
                Piece(places[bucket.owner], bucket.segment, bucket.start + start, start, nbytes)
                for start, nbytes in ranges
            )
            routes.append((tuple(pieces),))
        buckets = tuple(
            msgspec.structs.replace(bucket, owner=_HERE if index in needed else _ELSEWHERE)
            for index, bucket in enumerate(self._plan.buckets)
        )
        plan = PeerPlan(msgspec.structs.replace(self._plan, buckets=buckets), self._catalog.holdings, tuple(routes))
        self._source = PeerSource(
            plan,
            _HERE,
            peers=peers_of(plan),
            local=lambda _bucket, _route: None,
            store=self._rings.store(),
            device=CpuDevice(0),
            cancel=cancel,
            keep=False,
            ring=self.ring,
        )

    @property
    def source(self) -> PeerSource:
        """What fetches."""
        if self._source is None:
            raise CheckpointStateError("buckets are fetched once it is known what is wanted of them")
        return self._source

    def place_of(self, index: int) -> int:
        """Where in the ring a bucket is, once it has come; waits for it.

        Raises:
            PeerError: it cannot be read.
            CheckpointEngineError: the cause with which the update was cancelled.
        """
        return self.source.read(index).data_ptr() - self.ring.address

    def close(self) -> None:
        """Stops. The ring stays for the next update, unless something may still land in it."""
        if self._source is not None:
            self._source.close()
        if not self.complete:
            self._rings.retire()

    def spans(self) -> list[Span]:
        """When each bucket was fetched."""
        return self.source.spans()


def unite(wanted: Sequence[Sequence[Wanted]]) -> list[Wanted]:
    """What any of several workers wants of each bucket; ranges ascend and do not touch."""
    united: list[Wanted] = []
    for each in zip(*wanted, strict=True):
        known = [ranges for ranges in each if ranges is not None]
        united.append(None if len(known) < len(each) else tuple(_joined(sorted(r for ranges in known for r in ranges))))
    return united


def _joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begin = end = -1
    for start, nbytes in ranges:
        if start > end:
            if end > begin:
                yield begin, end - begin
            begin, end = start, start + nbytes
        end = max(end, start + nbytes)
    if end > begin:
        yield begin, end - begin
