"""One update on one rank, from asking the engine to its last answer. How the bytes travel is the transport's part."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.catalog import SegmentEntry
from checkpoint_engine.contract.failure import Failure, Held
from checkpoint_engine.contract.modes import word_for
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.contract.reports import name_of_update
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, RankError, UpdateError
from checkpoint_engine.link.channel import Listener
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import Registered
from checkpoint_engine.transfer.introduction import Introduction, addresses_of, decode_introductions
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.report import StageClock, UpdateReport
from checkpoint_engine.transfer.sent_sums import AfterLoading, SentSums
from checkpoint_engine.transfer.trace import Trace
from checkpoint_engine.transfer.transport import Prepared, RankResources, Transport, UpdateContext
from checkpoint_engine.transfer.watch import EngineRequest, Watch
from checkpoint_engine.transfer.worker_links import WorkerLinks

__all__ = ["UpdateRun"]


class UpdateRun:
    """Runs one update. Every rank makes one and calls `run`, also those whose engines are not updated."""

    def __init__(
        self,
        order: UpdateOrder,
        transport: type[Transport],
        rank: RankResources,
        held: Registered | None,
        key: str,
        deadline: Deadline,
        cancel: Cancel,
    ) -> None:
        """Prepares.

        Args:
            order: What to do.
            transport: How.
            rank: What this rank brings.
            held: What it holds of the checkpoint.
            key: Names the call, alike on all ranks.
            deadline: By when it is to be over.
            cancel: Ends it.
        """
        self._order = order
        self._rank = rank
        self._board = rank.group.board
        self._device = rank.device
        self._progress = rank.progress
        self._held = held
        self._deadline = deadline
        self._clock = StageClock(Trace() if order.trace else None)
        self._workers = WorkerLinks()
        self.cancel = cancel
        self.names: tuple[str, ...] = ()
        """What the workers that this rank feeds call this update."""
        self.all_finished = False
        """Whether the workers of all ranks have said that they hold the new weights."""
        self._request: EngineRequest | None = None
        self._key = key
        self._made = transport(UpdateContext(order, key, rank, held, self._deadline, self.cancel, self._clock))
        self._transport = self._made
        """That, or what it has settled on."""

    def run(self) -> UpdateReport:
        """Does the update and returns once every engine worker of every rank has finished it.

        Raises:
            UpdateError: it did not complete; the message names the rank, the phase and the cause.
        """
        with (
            self._device.active(),  # an HTTP server calls from any of its threads
            Watch(self._board, self._key, self.cancel, self._deadline, self._workers.stopped) as watch,
            self._rank.stagings.for_one_update(),
            ExitStack() as stack,
        ):
            try:
                report = self._run(stack) if self._board.rank in self._order.receivers else self._stand_by(stack)
            except Exception as error:
                raise self._explain(error, watch) from error
            freeing = time.perf_counter()
        self._clock.note("free", freeing)
        trace = self._clock.trace and self._clock.trace.finish(self._board.rank, self._device.identity)
        return replace(report, seconds=self._clock.total(), trace=trace)

    @property
    def arrived(self) -> tuple[list[Segment], list[SegmentEntry]] | None:
        """What was read from elsewhere and is to stay on this rank, once it has run."""
        return self._transport.arrived

    @property
    def held(self) -> Held:
        """What the workers hold that this rank feeds."""
        return self._workers.held()

    def workers_held(self, updates: Collection[str]) -> bool:
        """Whether what they held whole before this came by one of these updates."""
        return self._workers.held_before(updates)

    def engine_is_through(self, seconds: float) -> bool:
        """Whether the engine has answered the request that was sent from here, if one was; waits so long for it."""
        return self._request is None or self._request.ends(seconds)

    def _run(self, stack: ExitStack) -> UpdateReport:
        self._progress.phase = Phase.INTRODUCE
        listeners: list[Listener] = []
        for _ in range(self._order.workers):
            listeners.append(Listener())
            stack.callback(listeners[-1].close)
        self.names = tuple(name_of_update(listener.handle) for listener in listeners)
        stack.callback(self._made.close)
        with self._clock.step(Phase.INTRODUCE.value):
            ranks = self._introduce([listener.handle for listener in listeners])
        with self._clock.step("plan"):
            plan = self._plan(ranks)
        prepared = self._transport.prepare(ranks, plan)
        request = self._meet_workers(stack, listeners, ranks, plan, prepared)
        self._transport.run(self._workers)
        details = self._complete(request)
        return self._report(plan, self._transport.staging, details)

    def _stand_by(self, stack: ExitStack) -> UpdateReport:
        """This rank's engine keeps its weights; its host memory must stay as it is until the others have theirs."""
        stack.callback(self._made.close)
        plan = self._plan(self._introduce([""]))
        self._progress.phase = Phase.CONNECT
        self._agree("connected")
        self._progress.phase = Phase.LOAD
        self._agree_on_loaded()
        self._progress.phase = Phase.FINISH
        self._agree("finished")
        self.all_finished = True
        return self._report(plan, "none: this rank's engine was not updated", {})

    def _introduce(self, handles: Sequence[str]) -> list[Introduction]:
        """Tells the others of this rank and hears of them; then it is settled how the bytes travel."""
        self._progress.phase = Phase.INTRODUCE
        mine = Introduction(self._device.identity, tuple(handles), self._order.digest)
        refusal: CheckpointEngineError | None = None
        try:
            self._wait_for_bytes()
            mine = self._made.introduce(mine)
        except CheckpointEngineError as error:
            refusal = error
            mine = msgspec.structs.replace(mine, refusal=f"{type(error).__name__}: {error}")
        texts = self._gather("introduced", mine.encode())
        if refusal is not None:
            raise refusal
        ranks = decode_introductions(texts, self._board.rank, self._order.catalog.name)
        self._transport = self._made.settle(ranks)
        return ranks

    def _wait_for_bytes(self) -> None:
        """What others read, or what is read all at once, must be there before anybody hears of it."""
        refill = self._held.refill if self._held is not None else None
        if refill is not None and not (self._made.sends_as_it_comes and self._board.rank in self._order.receivers):
            with self._clock.step("fill"):
                refill.wait_for_all(self.cancel.check)
        if self._held is not None and self._held.check_bytes is not None:
            with self._clock.step("checksums"):
                self._held.check_bytes()

    def _plan(self, ranks: list[Introduction]) -> BucketPlan:
        plan = self._transport.plan(ranks)
        self._progress.buckets, self._progress.nbytes = len(plan.buckets), plan.nbytes
        self._progress.buckets_done = self._progress.bytes_done = 0
        if self._order.checksum:
            self._transport.sums = SentSums(plan)
        return plan

    def _meet_workers(
        self,
        stack: ExitStack,
        listeners: list[Listener],
        ranks: list[Introduction],
        plan: BucketPlan,
        prepared: Prepared,
    ) -> EngineRequest:
        """Asks the engine to update, and begins with its workers as soon as they have come."""
        self._progress.phase = Phase.CONNECT
        connecting = time.perf_counter()
        addresses = addresses_of(ranks, by_number=self._transport.numbers_workers)
        ask = self._order.ask_engine  # without `self`: in a circle, all that this knows would outlive it
        self._request = request = EngineRequest(lambda: ask(addresses), self.cancel)
        stack.callback(self._workers.close)
        first = self._board.rank * len(listeners)
        names = [name for name, _ in addresses[first : first + len(listeners)]]
        with self._clock.step("wait for the worker"):
            self._workers.accept(listeners, self._deadline, self.cancel, names)
        order = self._order
        with self._clock.step("worker checks"):
            announced = self._rank.plans.announce(plan)
            for link in self._workers.links:
                link.announce(
                    self._key,
                    order.catalog.name,
                    order.version,
                    announced,
                    prepared.memory,
                    word_for(order.operation, order.reload),
                    prepared.remote,
                    checksums=order.checksum,
                    partial=order.partial,
                )
            self._workers.wait_until_ready()
        self._agree("connected")
        self._clock.lap(Phase.CONNECT.value, connecting)
        self._progress.phase = Phase.LOAD
        return request

    def _complete(self, request: EngineRequest) -> dict[str, str | int | float]:
        """Has the worker finish once all ranks' workers have loaded everything; returns what it tells of itself."""
        self._transport.confirm()
        sums = self._agree_on_loaded()
        self._progress.phase = Phase.FINISH
        finishing = time.perf_counter()
        with self._clock.step("worker finishes"):
            details = self._workers.finish(self._transport.let_go, sums)
        self._rank.stagings.leave_with_workers(self._workers.channels)
        self._agree("finished")
        self.all_finished = True
        with self._clock.step("engine answers"):
            request.join(self._deadline.remaining)
        if request.pause.seconds is not None:
            self._clock.add("paused", request.pause.seconds)
        self._transport.finished()
        self._clock.lap(Phase.FINISH.value, finishing)
        return details

    def _agree_on_loaded(self) -> tuple[int, ...]:
        """All workers have everything, and nothing that it came from has changed meanwhile, as far as one looks.

        Returns the checksums of all that was sent, where they were asked for.
        """
        sums = self._transport.sums
        mine = AfterLoading(self._held is not None and self._held.can_change, sums.taken() if sums is not None else {})
        with self._clock.step("wait for other ranks"):
            parts = self._gather("loaded", msgspec.msgpack.encode(mine))
        loaded = [msgspec.msgpack.decode(part, type=AfterLoading) for part in parts]
        if any(rank.can_change for rank in loaded):
            if self._held is not None:
                self._held.check()
            self._agree("sure of what was sent")
        return sums.united(loaded) if sums is not None else ()

    def _agree(self, what: str) -> None:
        with self._clock.step("wait for other ranks"):
            self._gather(what, b"")

    def _gather(self, what: str, mine: bytes) -> list[bytes]:
        key = f"{self._key}/{what}"
        return self._board.gather(key, mine, self._deadline, self.cancel, f"all ranks being {what}")

    def _explain(self, error: Exception, watch: Watch) -> UpdateError:
        """Finds the first cause, tells the other ranks, and makes this rank's worker give up."""
        given_up = self.cancel.cause if isinstance(error, RankError) else None  # for that, and so it failed here
        own = self._workers.failure() or given_up or error
        failure = self._first_failure(own, watch)
        self._workers.abort(f"rank {failure.rank}: {failure.message}")
        where = "" if self._board.world_size == 1 else f" on rank {failure.rank}"
        explained = failure.as_error(
            f"the update to {self._order.version!r} failed{where} in phase '{failure.phase}': {failure.message}"
        )
        settled = self._request and self._request.settled()
        if settled and str(settled) not in failure.message:
            explained.add(str(settled))
            explained.held = settled.held
        return explained

    def _first_failure(self, own: Exception, watch: Watch) -> Failure:
        if isinstance(own, RankError):
            patience = Deadline(limits.EXPLANATION)
            while watch.first_failure() is None and self._board.lost() is None and not patience.expired:
                time.sleep(0.02)
        return watch.report(Failure.of(own, self._progress.phase, self._board.rank))

    def _report(self, plan: BucketPlan, staging: str, details: dict[str, str | int | float]) -> UpdateReport:
        announced = self._rank.plans.announce(plan)
        return UpdateReport(
            version=self._order.version,
            method=self._transport.method.value,
            nbytes=announced.nbytes,
            tensors=announced.tensors,
            buckets=len(plan.buckets),
            bucket_size=plan.bucket_size,
            staging=staging,
            staging_kept=self._rank.stagings.kept,
            seconds=self._clock.total(),
            engine=details,
        )
