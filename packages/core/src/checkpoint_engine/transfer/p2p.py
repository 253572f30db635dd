"""P2P: receivers read what they lack out of host memory of others, whose engines go on undisturbed.

Among the receivers it then goes on as in a broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry
from checkpoint_engine.errors import CheckpointStateError, RankError, SettingError
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.planning.buckets import Bucket, BucketPlan
from checkpoint_engine.planning.peers import PeerPlan, Route, plan_peer_reads, port_of
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.broadcast import Broadcast
from checkpoint_engine.transfer.fetching import PeerSource
from checkpoint_engine.transfer.introduction import Introduction
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.peers import peers_of
from checkpoint_engine.transfer.sources import BucketSource, find_bucket
from checkpoint_engine.transfer.transport import UpdateContext

__all__ = ["P2P"]


class P2P(Broadcast):
    """Some ranks are updated, or what they are updated with is held elsewhere."""

    method = Method.P2P
    yields_to_p2p = False

    def __init__(self, update: UpdateContext) -> None:
        super().__init__(update)
        self._held = None if update.order.remote else update.held
        self._store: P2PStore | None = None
        self._holder = -1
        self._reads: PeerPlan | None = None
        self._fetching: PeerSource | None = None
        self._arrived: tuple[list[Segment], list[SegmentEntry]] | None = None

    @classmethod
    def check(cls, order: UpdateOrder) -> None:
        """It reads from others, so there must be some."""
        super().check(order)
        if order.everywhere:
            raise SettingError(
                "these ranks hold all there is, and all are updated: nobody reads from others. Leave the method out; "
                "or give the ranks that are to be updated, or load the metas of parameter servers that hold it"
            )

    @property
    def sends_as_it_comes(self) -> bool:
        """Others read this rank's memory, and know nothing of what is missing."""
        return False

    @property
    def arrived(self) -> tuple[list[Segment], list[SegmentEntry]] | None:
        """What was read, if it is to stay."""
        return self._arrived

    def introduce(self, mine: Introduction) -> Introduction:
        """With how this rank is reached, and where its segments are read."""
        self._store, access = self._rank.connect(self._held)
        self._holder = access.rank
        bare = tuple(msgspec.structs.replace(segment, tensors=()) for segment in access.segments)
        return super().introduce(msgspec.structs.replace(mine, access=msgspec.structs.replace(access, segments=bare)))

    def plan(self, ranks: Sequence[Introduction]) -> BucketPlan:
        """Spreads the reads over the network cards of all that hold something and all that receive."""
        order = self._order
        reached = {rank: each.access for rank, each in enumerate(ranks) if each.access is not None}
        ports = [port_of(reached[rank]) for rank in order.receivers]
        if order.remote:
            replicas, at_home = order.replicas, None
        else:
            replicas = (_with_access(order.catalog, list(reached.values())),)
            at_home = {rank: index for index, rank in enumerate(order.receivers)}
        self._reads = plan_peer_reads(replicas, self._rank.settings.bucket_size, ports, at_home)
        return self._reads.plan

    def open_source(self, plan: BucketPlan) -> BucketSource:
        """Starts to read.

        Raises:
            PeerError: a holder does not share its memory.
        """
        del plan
        if self._reads is None or self._store is None:
            raise CheckpointStateError("an update is planned before it begins")
        self._fetching = PeerSource(
            self._reads,
            self._index,
            peers=peers_of(self._reads),
            local=self._local,
            store=self._store,
            device=self._rank.device,
            cancel=self._update.cancel,
            keep=self._order.keep,
        )
        return self._fetching

    def confirm(self) -> None:
        """Asks holders once more whose memory is files, once they have noticed whoever wrote to these."""
        if self._reads is None or self._store is None:
            return
        settling = max((holder.settling for holder in self._reads.holders), default=0.0)
        if self._order.remote and settling:
            self._update.cancel.wait(settling)
            for holder, peer in zip(self._reads.holders, peers_of(self._reads), strict=True):
                if holder.settling:
                    self._store.verify(peer)

    def finished(self) -> None:
        """Takes what is to stay from the source before that is closed."""
        if self._order.keep and self._fetching is not None:
            self._arrived = self._fetching.kept()

    def _local(self, bucket: Bucket, route: Route) -> torch.Tensor | None:
        if self._order.remote or self._reads is None or not route:
            return None
        holder = self._reads.holders[route[0].holder]
        return find_bucket(self._held, bucket, self._order.catalog.name) if holder.rank == self._holder else None


def _with_access(catalog: Catalog, reached: Sequence[Holding]) -> Catalog:
    """The same catalog, every holder reachable as it introduced itself.

    What was gathered knows segments by the addresses that their owners use; others may have to read them elsewhere.
    """
    access = {holding.rank: holding for holding in reached}
    holdings = tuple(_reached_by(holding, access[holding.rank]) for holding in catalog.holdings)
    return msgspec.structs.replace(catalog, holdings=holdings)


def _reached_by(gathered: Holding, access: Holding) -> Holding:
    if [segment.nbytes for segment in gathered.segments] != [segment.nbytes for segment in access.segments]:
        raise RankError(f"rank {gathered.rank} holds something else than was gathered; call gather_metas again")
    segments = tuple(
        msgspec.structs.replace(segment, address=shown.address)
        for segment, shown in zip(gathered.segments, access.segments, strict=True)
    )
    return msgspec.structs.replace(access, segments=segments)
