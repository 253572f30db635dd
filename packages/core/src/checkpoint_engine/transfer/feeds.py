"""What an update feeds on: host memory of the ranks themselves (broadcast), or that of others (P2P)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import torch

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointStateError, PeerError
from checkpoint_engine.host.p2p_store import P2PStore, Peer
from checkpoint_engine.host.segment import Segment
from checkpoint_engine.planning.buckets import Bucket, BucketPlan
from checkpoint_engine.planning.peers import PeerPlan, Route, plan_peer_reads, port_of
from checkpoint_engine.transfer.announcement import PlanKeeper
from checkpoint_engine.transfer.fetching import PeerSource
from checkpoint_engine.transfer.sources import BucketSource, HostSource

FindBucket = Callable[[Bucket], torch.Tensor]
"""Gives a bucket that lies in this rank's own host memory."""


class Feed(Protocol):
    """One rank's view of where an update's bytes come from."""

    method: str
    receivers: tuple[int, ...]
    """Ranks whose engine workers are updated, ascending."""

    def introduction(self) -> Holding | None:
        """How the other ranks reach this one's memory; None if they need not.

        Raises:
            CheckpointEngineError: this rank cannot take part.
        """
        ...

    def plan(self, introductions: Sequence[Holding | None], bucket_size: int) -> BucketPlan:
        """The buckets; the owner of each is the place of a rank among the receivers. Alike on all ranks."""
        ...

    def open(self, place: int, cancel: Cancel) -> BucketSource:
        """Begins to bring the buckets of the receiver at `place`."""
        ...

    def finished(self) -> None:
        """The engine has everything; called before the source is closed."""
        ...


class HostFeed:
    """All ranks are updated, and what they hold is all there is."""

    method = "broadcast"

    def __init__(self, catalog: Catalog, ranks: int, find: FindBucket, plans: PlanKeeper) -> None:
        self.receivers = tuple(range(ranks))
        self._catalog = catalog
        self._plans = plans
        self._find = find
        self._buckets: tuple[Bucket, ...] = ()

    def introduction(self) -> None:
        """Nobody reads this rank's memory."""

    def plan(self, introductions: Sequence[Holding | None], bucket_size: int) -> BucketPlan:
        """Every rank sends what it holds."""
        del introductions
        plan = self._plans.plan(self._catalog, bucket_size)
        self._buckets = plan.buckets
        return plan

    def open(self, place: int, cancel: Cancel) -> HostSource:
        """Nothing is to be brought."""
        del place, cancel
        return HostSource(lambda index: self._find(self._buckets[index]))

    def finished(self) -> None:
        """Nothing was brought."""


class PeerFeed:
    """Some ranks are updated; they read what they lack out of other processes' host memory."""

    method = "p2p"

    def __init__(
        self,
        replicas: Sequence[Catalog],
        receivers: Sequence[int],
        *,
        connect: Callable[[], tuple[P2PStore, Holding]],
        device: Device,
        find: FindBucket | None,
        keep: bool,
    ) -> None:
        """Prepares.

        Args:
            replicas: Catalogs of the parameter servers that hold the checkpoint.
            receivers: Ranks of this group that are updated.
            connect: Opens this rank's store, and says how it is reached.
            device: Of this rank.
            find: Gives buckets that this rank holds itself; None if the catalogs are of other parameter servers.
            keep: Whether everything that is read stays in host memory.
        """
        self.receivers = tuple(sorted(receivers))
        self._replicas = replicas
        self._connect = connect
        self._device = device
        self._find = find
        self._keep = keep
        self._store: P2PStore | None = None
        self._rank = -1
        self._plan: PeerPlan | None = None
        self._source: PeerSource | None = None
        self.kept: tuple[list[Segment], list[SegmentEntry]] = ([], [])
        """What stays in host memory after an update that was told to keep it: segments, and what is in them."""

    def introduction(self) -> Holding:
        """How this rank is reached.

        Raises:
            CheckpointEngineError: it cannot take part.
        """
        self._store, mine = self._connect()
        self._rank = mine.rank
        return msgspec.structs.replace(mine, segments=())

    def plan(self, introductions: Sequence[Holding | None], bucket_size: int) -> BucketPlan:
        """Spreads the reads over the network cards of all that hold something and all that receive."""
        known = [holding for holding in introductions if holding is not None]
        if self._find is not None:
            self._replicas = [_with_access(self._replicas[0], known)]
        ports = [port_of(known[rank]) for rank in self.receivers]
        at_home = {rank: place for place, rank in enumerate(self.receivers)} if self._find is not None else None
        self._plan = plan_peer_reads(self._replicas, bucket_size, ports, at_home)
        return self._plan.plan

    def open(self, place: int, cancel: Cancel) -> PeerSource:
        """Starts to read.

        Raises:
            PeerError: a holder does not share its memory.
        """
        if self._plan is None or self._store is None:
            raise CheckpointStateError("an update is planned before it begins")
        self._source = PeerSource(
            self._plan,
            place,
            peers=peers_of(self._plan),
            local=self._local,
            store=self._store,
            device=self._device,
            cancel=cancel,
            keep=self._keep,
        )
        return self._source

    def finished(self) -> None:
        """Every bucket has been loaded: what is to be kept is taken from the source before that is closed."""
        if self._keep and self._source is not None:
            self.kept = self._source.kept()

    def _local(self, bucket: Bucket, route: Route) -> torch.Tensor | None:
        if self._find is None or self._plan is None or not route:
            return None
        holder = self._plan.holders[route[0].holder]
        return self._find(bucket) if holder.rank == self._rank else None


def peers_of(plan: PeerPlan) -> list[Peer]:
    """How each holder of a plan is reached.

    Raises:
        PeerError: one does not share its memory.
    """
    return [_peer_of(holding) for holding in plan.holders]


def _peer_of(holding: Holding) -> Peer:
    if holding.p2p_address is None or not holding.generation:
        if any(segment.tensors for segment in holding.segments):
            raise PeerError(
                f"rank {holding.rank} on {holding.host or 'an unknown host'} holds a part of it, but does not "
                "share its memory: start the seeds with CHECKPOINT_ENGINE_P2P=1 (or --p2p) and get their metas anew"
            )
        return Peer(f"rank {holding.rank}", "", "", 0, 0)
    return Peer(
        f"rank {holding.rank} on {holding.host}",
        holding.p2p_address,
        holding.transport,
        holding.control_address,
        holding.generation,
    )


def _with_access(catalog: Catalog, known: Sequence[Holding]) -> Catalog:
    """The same catalog, every holder reachable as it introduced itself."""
    access = {holding.rank: holding for holding in known}
    holdings = tuple(
        msgspec.structs.replace(access[holding.rank], segments=holding.segments) for holding in catalog.holdings
    )
    return msgspec.structs.replace(catalog, holdings=holdings)
