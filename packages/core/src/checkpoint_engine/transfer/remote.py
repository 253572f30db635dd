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
from checkpoint_engine.link.messages import Wanted
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.planning.buckets import BucketPlan, align_up
from checkpoint_engine.planning.peers import PeerPlan, ReadPiece, Route
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.fetching import READS_AHEAD, PeerSource
from checkpoint_engine.transfer.peers import peers_of
from checkpoint_engine.transfer.trace import Span

__all__ = ["RemoteBuckets", "RingCache", "unite"]

_LOCAL, _REMOTE = 0, 1


class RingCache:
    """The ring of a rank; cached, because workers cache what they have mapped and registered."""

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

    def __init__(self, plan: BucketPlan, catalog: Catalog, indexes: Sequence[int], rings: RingCache) -> None:
        """Makes the ring ready; nothing is fetched before `start`.

        Args:
            plan: All buckets.
            catalog: Who holds them, and how that is reached.
            indexes: Of the buckets that are to be fetched, in the order in which they are.
            rings: Of this rank.

        Raises:
            HostMemoryError: there is no room for the ring.
        """
        self.indexes = tuple(indexes)
        self._plan = plan
        self._catalog = catalog
        self._rings = rings
        largest = max(align_up(plan.buckets[index].nbytes) for index in indexes)
        self.ring = rings.take(largest * min(READS_AHEAD, len(indexes)))
        self._source: PeerSource | None = None
        self.complete = False
        """Whether everything has come, and been copied."""

    def start(self, wanted: Sequence[Wanted], cancel: Cancel) -> None:
        """Begins to fetch; `wanted[i]` are the bytes that are needed of bucket `indexes[i]`.

        Raises:
            PeerError: a holder does not share its memory.
        """
        holders = {holding.rank: index for index, holding in enumerate(self._catalog.holdings)}
        needed = dict(zip(self.indexes, wanted, strict=True))
        routes: list[tuple[Route, ...]] = []
        for index, bucket in enumerate(self._plan.buckets):
            ranges = ((0, bucket.nbytes),) if (found := needed.get(index, ())) is None else found
            pieces = (
                ReadPiece(holders[bucket.owner], bucket.segment, bucket.start + start, start, nbytes)
                for start, nbytes in ranges
            )
            routes.append((tuple(pieces),))
        buckets = tuple(
            msgspec.structs.replace(bucket, owner=_LOCAL if index in needed else _REMOTE)
            for index, bucket in enumerate(self._plan.buckets)
        )
        plan = PeerPlan(msgspec.structs.replace(self._plan, buckets=buckets), self._catalog.holdings, tuple(routes))
        self._source = PeerSource(
            plan,
            _LOCAL,
            peers=peers_of(plan),
            local=lambda _bucket, _route: None,
            store=self._rings.store(),
            device=CpuDevice(0),
            cancel=cancel,
            keep=False,
            ring=self.ring,
            order=self.indexes,
        )

    @property
    def source(self) -> PeerSource:
        """What fetches."""
        if self._source is None:
            raise CheckpointStateError("buckets are fetched once it is known what is wanted of them")
        return self._source

    def offset_of(self, index: int) -> int:
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
