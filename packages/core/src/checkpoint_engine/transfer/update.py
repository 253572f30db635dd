"""One update on one rank, from asking the engine to its last answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from checkpoint_engine.catalog import Catalog, Holding
from checkpoint_engine.collective import Failure, RankGroup
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import Device, Lendable
from checkpoint_engine.errors import CheckpointEngineError, RankError, UpdateError
from checkpoint_engine.host.segment import Segment
from checkpoint_engine.link.channel import Listener
from checkpoint_engine.link.messages import ReloadMode, Wanted
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.planning.staging import place_buckets
from checkpoint_engine.settings import Settings
from checkpoint_engine.transfer.announcement import PlanKeeper
from checkpoint_engine.transfer.broadcast import BroadcastPipeline
from checkpoint_engine.transfer.direct import RING, DirectTransfer, LentSegments, find_obstacle
from checkpoint_engine.transfer.feeds import Feed
from checkpoint_engine.transfer.gate import Gate
from checkpoint_engine.transfer.introduction import (
    Introduction,
    addresses_of,
    agreed_generation,
    decode_introductions,
)
from checkpoint_engine.transfer.offers import Offer, make_offer
from checkpoint_engine.transfer.remote import RemoteBuckets, RingKeeper, unite
from checkpoint_engine.transfer.report import Method, Progress, StageClock, UpdateReport
from checkpoint_engine.transfer.staging import StagingKeeper, choose_staging
from checkpoint_engine.transfer.trace import Trace
from checkpoint_engine.transfer.watch import EngineRequest, Watch
from checkpoint_engine.transfer.workers import Workers

logger = logging.getLogger(__name__)

RequestFunction = Callable[[list[tuple[str, str]]], None]
"""Gets (device identity, handle) of all ranks in order of rank, and asks the engine to update with them."""

_EXPLANATION_SECONDS = 2.0
"""A rank that sees a peer vanish waits so long for the peer's own word of why."""


@dataclass(frozen=True)
class UpdateOrder:
    """What is to be done, the same on every rank. `digest` stands for the catalog with all its offsets."""

    key: str
    catalog: Catalog
    digest: str
    version: str
    ask_engine: RequestFunction
    timeout: timedelta
    trace: bool = False
    reload: ReloadMode = "auto"
    method: Method = "broadcast"
    workers: int = 1
    """Engine workers that each rank feeds; several in a direct update only."""


class UpdateRun:
    """Runs one update. Every rank makes one and calls `run`, also those whose engines are not updated."""

    def __init__(
        self,
        order: UpdateOrder,
        *,
        group: RankGroup,
        device: Device,
        settings: Settings,
        stagings: StagingKeeper,
        rings: RingKeeper,
        plans: PlanKeeper,
        feed: Feed,
        progress: Progress,
        segments: Sequence[Segment] = (),
    ) -> None:
        """Prepares; `segments` are those of this rank that hold the checkpoint."""
        self._order = order
        self._group = group
        self._board = group.board
        self._device = device
        self._settings = settings
        self._stagings = stagings
        self._rings = rings
        self._plans = plans
        self._feed = feed
        self._progress = progress
        self._segments = segments
        self._deadline = Deadline(order.timeout.total_seconds())
        self._clock = StageClock(Trace() if order.trace else None)
        self._workers = Workers()
        self._wanted: list[tuple[Wanted, ...]] = []
        self.cancel = Cancel()

    def run(self) -> UpdateReport:
        """Does the update and returns once every engine worker of every rank has finished it.

        Raises:
            UpdateError: it did not complete; the message names the rank, the phase and the cause.
        """
        with (
            self._device.active(),  # an HTTP server calls from any of its threads
            Watch(self._board, self._order.key, self.cancel, self._deadline) as watch,
            self._stagings.for_one_update(),
            ExitStack() as stack,
        ):
            try:
                report = self._run(stack)
            except Exception as error:
                raise self._explain(error, watch) from error
            freeing = time.perf_counter()
        self._clock.note("free", freeing)
        trace = self._clock.trace and self._clock.trace.finish(self._board.rank, self._device.identity)
        return replace(report, seconds=self._clock.total(), trace=trace)

    def _run(self, stack: ExitStack) -> UpdateReport:
        if self._board.rank not in self._feed.receivers:
            return self._stand_by()
        listeners = [Listener() for _ in range(self._order.workers)]
        for listener in listeners:
            stack.callback(listener.close)
        gate = Gate()
        stack.callback(gate.close)
        with self._clock.step("introduce"):
            ranks = self._introduce([listener.handle for listener in listeners], gate.offer)
        with self._clock.step("plan"):
            plan = self._plan(ranks)
        offers = self._accept_offers(ranks)
        if offers:
            return self._run_direct(stack, listeners, ranks, plan, offers)
        receivers = self._feed.receivers
        place = receivers.index(self._board.rank)
        source = self._feed.open(place, self.cancel)
        stack.callback(source.close)
        available = min(ranks[rank].available for rank in receivers)
        staging_device, layout = choose_staging(plan, len(receivers), self._device, available, self._board.rank)
        with self._clock.step("communicator"):
            communicator = self._group.communicator(
                staging_device.backend,
                staging_device.torch_device,
                agreed_generation(ranks, receivers, self._order.key),
                self._deadline,
                receivers,
            )
        if communicator is not None:
            self.cancel.on_set(communicator.abort)
            gate.meet({rank: offer for rank in receivers if (offer := ranks[rank].gate) and rank != self._board.rank})

        with self._clock.step("staging"):
            staging = self._stagings.take(staging_device, layout.nbytes)
        request = self._meet_workers(stack, listeners, ranks, plan, staging)
        BroadcastPipeline(
            rank=place,
            plan=plan,
            places=place_buckets(plan, layout, place),
            staging=staging,
            device=staging_device,
            communicator=communicator,
            gate=gate,
            link=self._workers.links[0],
            source=source,
            cancel=self.cancel,
            progress=self._progress,
            clock=self._clock,
        ).run()
        details = self._complete(request)
        where = "host" if staging_device is not self._device else staging_device.torch_device.type
        rings = "one ring" if layout.shared else "two rings"
        return self._report(plan, f"{layout.nbytes / 1e6:.1f} MB on {where}, {rings}", details)

    def _run_direct(
        self,
        stack: ExitStack,
        listeners: list[Listener],
        ranks: list[Introduction],
        plan: BucketPlan,
        offers: list[Offer],
    ) -> UpdateReport:
        with self._clock.step("lend"):
            host = offers[self._board.rank].host
            here = {rank: offer for rank, offer in enumerate(offers) if offer.host == host}
            remote = self._open_remote(stack, plan, here)
            ring = {} if remote is None else {RING: make_offer([remote.ring])}
            lent = LentSegments({**here, **ring})
            self._stagings.lend(lent)
        away = () if remote is None else remote.away
        request = self._meet_workers(stack, listeners, ranks, plan, lent, away)
        if remote is not None:
            remote.start(unite(self._wanted), self.cancel)
        DirectTransfer(
            plan=plan,
            lent=lent,
            links=self._workers.links,
            remote=remote,
            cancel=self.cancel,
            progress=self._progress,
            clock=self._clock,
        ).run()
        if remote is not None:
            remote.complete = True
        details = self._complete(request)
        return self._report(plan, f"none: workers read {len(lent.descriptors)} segments", details, method="direct")

    def _open_remote(self, stack: ExitStack, plan: BucketPlan, here: Mapping[int, Offer]) -> RemoteBuckets | None:
        """What is to be fetched from other hosts; None if this one has everything."""
        away = [index for index, bucket in enumerate(plan.buckets) if bucket.owner not in here]
        if not away:
            return None
        remote = RemoteBuckets(plan, self._order.catalog, away, self._rings)
        stack.callback(remote.close)
        return remote

    def _accept_offers(self, ranks: list[Introduction]) -> list[Offer]:
        """What the ranks lend if the update is to be direct, and empty if it is not; alike on all ranks.

        Raises:
            RankError: it was to be direct and cannot.
        """
        offers = [rank.offer for rank in ranks if rank.offer is not None]
        if len(offers) < len(ranks):
            return []
        obstacle = find_obstacle(offers, self._order.catalog)
        if obstacle and self._order.method == "direct":
            raise RankError(f"a direct update is not possible: {obstacle}; --method broadcast does without")
        if obstacle:
            logger.info("by broadcast, since a direct update is not possible: %s", obstacle)
        return [] if obstacle else offers

    def _meet_workers(
        self,
        stack: ExitStack,
        listeners: list[Listener],
        ranks: list[Introduction],
        plan: BucketPlan,
        memory: Lendable,
        away: Sequence[int] = (),
    ) -> EngineRequest:
        """Asks the engine to update, and begins with its workers as soon as they have come."""
        self._progress.phase = "connect"
        connecting = time.perf_counter()
        without_device = self._device.torch_device.type == "cpu" or self._order.workers > 1
        addresses = addresses_of(ranks, by_place=self._order.method == "direct" and without_device)
        request = EngineRequest(lambda: self._order.ask_engine(addresses), self.cancel)
        stack.callback(self._workers.close)
        first = self._board.rank * len(listeners)
        names = [name for name, _ in addresses[first : first + len(listeners)]]
        with self._clock.step("wait for the worker"):
            self._workers.accept(listeners, self._deadline, self.cancel, names)
        order = self._order
        with self._clock.step("worker checks"):
            announced = self._plans.announce(plan)
            for link in self._workers.links:
                link.announce(order.key, order.catalog.name, order.version, announced, memory, order.reload, away)
            self._wanted = self._workers.wait_until_ready()
        self._agree("connected")
        self._clock.lap("connect", connecting)
        self._progress.phase = "load"
        return request

    def _complete(self, request: EngineRequest) -> dict[str, str | int | float]:
        """Has the worker finish once all ranks' workers have loaded everything; returns what it tells of itself."""
        self._agree("loaded")
        self._progress.phase = "finish"
        finishing = time.perf_counter()
        with self._clock.step("worker finishes"):
            details = self._workers.finish()
        self._stagings.leave_with_workers(self._workers.channels)
        self._agree("finished")
        with self._clock.step("engine answers"):
            request.join(self._deadline.remaining)
        self._feed.finished()
        self._clock.lap("finish", finishing)
        return details

    def _stand_by(self) -> UpdateReport:
        """This rank's engine keeps its weights; its host memory must stay as it is until the others have theirs."""
        plan = self._plan(self._introduce([""]))
        for phase, agreed in (("connect", "connected"), ("load", "loaded"), ("finish", "finished")):
            self._progress.phase = phase
            self._agree(agreed)
        return self._report(plan, "none: this rank's engine was not updated", {})

    def _plan(self, ranks: list[Introduction]) -> BucketPlan:
        plan = self._feed.plan([rank.access for rank in ranks], self._settings.bucket_size)
        self._progress.buckets, self._progress.nbytes = len(plan.buckets), plan.nbytes
        self._progress.buckets_done = self._progress.bytes_done = 0
        return plan

    def _introduce(self, handles: Sequence[str], gate: Offer | None = None) -> list[Introduction]:
        self._progress.phase = "introduce"
        free = self._device.memory()[0] + self._stagings.held(self._device)
        access: Holding | None = None
        refusal: CheckpointEngineError | None = None
        try:
            access = self._feed.introduction()
        except CheckpointEngineError as error:
            refusal = error
        mine = Introduction(
            self._device.identity,
            tuple(handles),
            int(free * self._settings.mem_fraction),
            self._order.digest,
            self._group.generation_of(self._feed.receivers),
            access,
            offer=None if self._order.method == "broadcast" else make_offer(self._segments),
            gate=gate,
            refusal=f"{type(refusal).__name__}: {refusal}" if refusal else "",
        )
        texts = self._gather("introduced", mine.encode())
        if refusal is not None:
            raise refusal
        return decode_introductions(texts, self._board.rank, self._order.catalog.name)

    def _agree(self, what: str) -> None:
        with self._clock.step("wait for other ranks"):
            self._gather(what, b"")

    def _gather(self, what: str, mine: bytes) -> list[bytes]:
        key = f"{self._order.key}/{what}"
        return self._board.gather(key, mine, self._deadline, self.cancel, f"all ranks being {what}")

    def _explain(self, error: Exception, watch: Watch) -> UpdateError:
        """Finds the first cause, tells the other ranks, and makes this rank's worker give up."""
        own = self._workers.failure() or error
        failure = self._first_failure(own, watch)
        self._workers.abort(f"rank {failure.rank}: {failure.message}")
        where = "" if self._board.world_size == 1 else f" on rank {failure.rank}"
        return UpdateError(
            f"the update to {self._order.version!r} failed{where} in phase {failure.phase!r}: {failure.message}",
            rank=failure.rank,
            phase=failure.phase,
            kind=failure.error,
        )

    def _first_failure(self, own: Exception, watch: Watch) -> Failure:
        mine = Failure(self._board.rank, self._progress.phase, type(own).__name__, str(own))
        try:
            if isinstance(own, RankError):
                patience = Deadline(_EXPLANATION_SECONDS)
                while watch.first_failure() is None and not patience.expired:
                    time.sleep(0.02)
            watch.report(mine)
            return watch.first_failure() or mine
        except (dist.DistError, RuntimeError):  # the store went with rank 0
            return mine

    def _report(
        self, plan: BucketPlan, staging: str, details: dict[str, str | int | float], method: str = ""
    ) -> UpdateReport:
        return UpdateReport(
            version=self._order.version,
            method=method or self._feed.method,
            nbytes=self._plans.announce(plan).nbytes,
            tensors=sum(len(bucket.tensors) for bucket in plan.buckets),
            buckets=len(plan.buckets),
            bucket_size=plan.bucket_size,
            staging=staging,
            staging_kept=self._stagings.kept,
            seconds=self._clock.total(),
            engine=details,
        )
