"""The updates of one rank, one at a time: what they share, what the last one came to, and what follows if one fails."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace

from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError, UpdateError
from checkpoint_engine.server.membership import Membership
from checkpoint_engine.server.rollback import Rollback
from checkpoint_engine.server.sharing import Sharing
from checkpoint_engine.server.update_events import UpdateEvents
from checkpoint_engine.settings import Settings
from checkpoint_engine.source.store import CheckpointStore
from checkpoint_engine.transfer import telemetry
from checkpoint_engine.transfer.announcement import PlanCache
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.remote import RingCache
from checkpoint_engine.transfer.report import Progress, UpdateReport
from checkpoint_engine.transfer.staging import StagingCache
from checkpoint_engine.transfer.transport import RankResources, Transport
from checkpoint_engine.transfer.transports import choose_transport
from checkpoint_engine.transfer.update import UpdateRun

__all__ = ["UpdateRunner"]


class UpdateRunner:
    """Runs what this rank is ordered to; keeps memory, plans and connections from one update to the next."""

    def __init__(
        self,
        membership: Membership,
        device: Device,
        settings: Settings,
        collective: str,
        store: CheckpointStore,
        sharing: Sharing,
        events: UpdateEvents,
    ) -> None:
        """Makes it; `collective` is what broadcasts tensors of the device, see `RankResources`."""
        self._membership = membership
        self._device = device
        self._settings = settings
        self._store = store
        self._sharing = sharing
        self._events = events
        self._collective = collective
        self._stagings = StagingCache(keep=settings.keep_staging)
        self._rings = RingCache(sharing.store)
        self._plans = PlanCache()
        self._rollback = Rollback(store)
        self._busy = threading.Lock()
        self._running: UpdateRun | None = None
        self._cancel: Cancel | None = None
        """Of the one that is running, also while it waits for other ranks to begin."""
        self.progress = Progress()
        self.last_report: UpdateReport | None = None

    def run(self, order: UpdateOrder) -> None:
        """Does one; all ranks do it together.

        Raises:
            CheckpointStateError: another one is running, or what would be kept is there already.
            UpdateError: it did not complete.
        """
        transport = choose_transport(order)
        if order.keep and order.name in self._store.names():
            raise CheckpointStateError(f"{order.name!r} is registered on this rank; unregister it, or leave keep out")
        if not self._busy.acquire(blocking=False):
            raise CheckpointStateError("an update is running on this rank already; wait for it, or abort it")
        try:
            with self._events.of(order, lambda: self.last_report):
                self._run(order, transport)
        finally:
            self._running = self._cancel = None
            self.progress.phase = Phase.IDLE
            self._busy.release()
            self._membership.end_default_group()

    def abort(self, reason: str) -> bool:
        """Gives up the one that is running, from another thread; returns whether there was one."""
        cancel = self._cancel
        if cancel is None:
            return False
        cancel.set(CheckpointEngineError(f"aborted: {reason}"))
        return True

    def release_staging(self) -> int:
        """Frees what was kept for the next one, and makes the engine's worker unmap it; returns bytes freed.

        Raises:
            CheckpointStateError: one is using it.
        """
        if not self._busy.acquire(blocking=False):
            raise CheckpointStateError("an update is using the staging memory; wait for it, or abort it")
        try:
            with self._device.active():
                freed = self._stagings.kept
                self._stagings.release()
                self._rings.close()
                return freed
        finally:
            self._busy.release()

    def take_back_staging(self) -> None:
        """Has workers unmap what they keep mapped, unless an update is running, which exports what it needs."""
        if self._busy.acquire(blocking=False):
            try:
                with self._device.active():
                    self._stagings.take_back()
            finally:
                self._busy.release()

    def end_staging(self) -> None:
        """Frees staging memory for good, whatever runs."""
        with self._device.active():
            self._stagings.release()

    def close(self) -> None:
        """Frees the rest, once the ranks have parted."""
        self._rings.close()
        self._rollback.close()

    # -- inside

    def _run(self, order: UpdateOrder, transport: type[Transport]) -> None:
        rank = self._resources()
        try:
            self.last_report = self._run_once(order, transport, rank)
        except UpdateError as error:
            if self._running is not None:  # else nobody was asked for anything
                self._rollback.after(
                    order,
                    self._running,
                    error,
                    rank.group,
                    lambda back: self._run_once(back, choose_transport(back), rank),
                )
            raise

    def _run_once(self, order: UpdateOrder, transport: type[Transport], rank: RankResources) -> UpdateReport:
        deadline = Deadline(order.timeout.total_seconds())
        self._cancel = cancel = Cancel()
        key = self._next_call(order, rank, deadline, cancel)
        with ExitStack() as stack:
            held = stack.enter_context(self._store.use(order.name)) if order.name in self._store.names() else None
            heard = replace(order, trace=order.trace or telemetry.is_listened_to())
            self._running = run = UpdateRun(heard, transport, rank, held, key, deadline, cancel)
            try:
                report = telemetry.run_told(order, run.run)
            except CheckpointEngineError:
                rank.group.drop_communicators()  # one may hang half-way through a broadcast; the next opens another
                raise
            self._rollback.note(order, held, run)
            if run.arrived is not None:
                self._store.adopt(order.name, *run.arrived)
        return report

    def _next_call(self, order: UpdateOrder, rank: RankResources, deadline: Deadline, cancel: Cancel) -> str:
        try:
            return rank.group.next_call(deadline, cancel)
        except CheckpointEngineError as error:
            phase = Phase.INTRODUCE
            number = rank.group.board.rank
            message = f"the update to {order.version!r} failed on rank {number} in phase '{phase}': {error}"
            raise Failure.of(error, phase, number).as_error(message) from error

    def _resources(self) -> RankResources:
        """What this rank brings to an update."""
        return RankResources(
            self._membership.group,
            self._device,
            self._settings,
            self._collective,
            self._stagings,
            self._rings,
            self._plans,
            lambda held: (self._sharing.store(), self._sharing.describe(held, share=True)),
            self.progress,
        )
