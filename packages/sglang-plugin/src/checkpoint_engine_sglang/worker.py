"""One worker of SGLang: takes updates together with all other workers of its engine, or none of them does."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec

from checkpoint_engine.sdk import Details, WorkerError, pick_handle, receive_update
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.adapters import cannot_keep, forget_adapter, load_adapter, without_adapters
from checkpoint_engine_sglang.admission import Verdict
from checkpoint_engine_sglang.agreement import Pending, WorkerGroup
from checkpoint_engine_sglang.compat import Position, Runner
from checkpoint_engine_sglang.giving_up import giving_up
from checkpoint_engine_sglang.messages import BUSY, Order, Report, failures_in
from checkpoint_engine_sglang.sink import SGLangSink

__all__ = ["WorkerSide"]

logger = logging.getLogger(__name__)

_LONGEST_WORD = 1000
"""Characters of an error, or of a version, in a status that nobody waits for: the room for it is small."""
_GRACE_SECONDS = 60.0
"""Workers that run into the deadline themselves get this much longer to say so."""


class WorkerSide:
    """What is kept beside a worker from one update to the next.

    Its methods are called on all workers of a replica at once, and exchange words with them a fixed number of times,
    whatever happens: a worker that fell out of step would leave the others waiting for ever.
    """

    def __init__(self, manager: Any, runners: Sequence[Runner], workers: WorkerGroup) -> None:  # noqa: ANN401
        self._manager = manager
        self._runners = runners
        self._workers = workers
        self.position: Position = compat.position_of(manager)
        self._device = compat.device_of(manager, self.position)
        self._sink = SGLangSink(runners, self.position.tensor_parallel_size, str(self.position))
        self._mixed = False
        """Whether the workers of this engine hold different versions."""
        self._error = ""
        self._door = ""
        self._last_update: Details = {}
        self._holds_engine = False
        self.lost_hooks: dict[str, str] = {}

    @property
    def dirty(self) -> bool:
        """Whether the engine's weights may be a mixture."""
        return self._sink.dirty or self._mixed

    def status(self) -> list[Report]:
        """What every worker holds."""
        return self._workers.exchange(self._report(ok=True, error=self._error), _GRACE_SECONDS)

    def start_status(self) -> Pending[Report]:
        """The same, without waiting for anybody."""
        report = self._report(ok=True, error=self._error[:_LONGEST_WORD])
        figures = {name: _shortened(value) for name, value in report.last_update.items()}
        return self._workers.start(
            msgspec.structs.replace(
                report,
                version=report.version[:_LONGEST_WORD],
                whole_version=report.whole_version[:_LONGEST_WORD],
                last_update=figures,
            )
        )

    def run(self, handles: Mapping[str, str], order: Order, *, flush: bool) -> list[Report]:
        """Takes an update, or compares the weights; returns what every worker says of it.

        Either all workers report success, or no caller will be told so.
        """
        start = time.perf_counter()
        reports = self._refused(handles, order, flush=flush and order.do == "update")
        if not reports:
            reports = self._workers.exchange(self._receive(handles, order), order.timeout + _GRACE_SECONDS)
        complete = [report.complete for report in reports]
        if any(complete) or any(report.dirty for report in reports):
            self._mixed = not all(complete)
        self._hold_or_release()
        if order.do == "update":
            self._note(order, reports)
            if self._error:
                logger.error("update of the weights failed: %s; %s", self._error, self.describe())
            else:
                logger.info("weights updated to version %r in %.2f s", order.version, time.perf_counter() - start)
        return [msgspec.structs.replace(report, dirty=self._mixed or report.dirty) for report in reports]

    def take_adapter(self, order: Order) -> list[Report]:
        """Loads a LoRA adapter beside those that are there; where one worker cannot, none keeps it."""
        scheduler = compat.scheduler_of(self._manager)
        error = load_adapter(scheduler, order.adapter)
        phase = "update" if error else ""
        reports = self._workers.exchange(self._report(ok=not error, phase=phase, error=error), _GRACE_SECONDS)
        if not all(report.ok for report in reports):
            forget_adapter(scheduler, order.adapter)
        return reports

    def describe(self) -> str:
        """What the engine holds, for people."""
        if self.dirty:
            return "its weights may be a mixture now; it answers no requests until an update succeeds"
        return f"this worker {self._sink.life.describe()}"

    def others_brought(self, version: str, door: str) -> None:
        """SGLang's own routes have changed the weights: they are not what came through here any more."""
        self._sink.others_brought(version)
        self._door, self._last_update = door, {}

    def stay_paused_if_dirty(self) -> None:
        """Keeps the scheduler from running requests with a mixture, whoever told it to go on."""
        if self.dirty:
            compat.set_paused(compat.scheduler_of(self._manager), True)
            self._holds_engine = True

    # -- inside

    def _note(self, order: Order, reports: Sequence[Report]) -> None:
        self._error = failures_in(list(reports))
        if not self._error:
            self._door, self._last_update = order.door, reports[self.position.rank].details

    def _refused(self, handles: Mapping[str, str], order: Order, *, flush: bool) -> list[Report]:
        """The reports of all workers if one of them cannot begin; nothing has changed then."""
        reason, busy = self._why_not(handles, flush=flush)
        mine = self._report(ok=not reason, phase=BUSY if busy else "prepare", error=reason)
        everybody = self._workers.exchange(mine, order.timeout + _GRACE_SECONDS)
        return [] if all(report.ok for report in everybody) else everybody

    def _why_not(self, handles: Mapping[str, str], *, flush: bool) -> tuple[str, bool]:
        """Why this worker cannot begin, before it connects to anybody; and whether it only has to be asked again."""
        try:
            pick_handle(handles, self._device, self.position.overall, self.position.world_size * self.position.replicas)
        except WorkerError as error:
            return str(error), False
        for runner in self._runners:
            reason = compat.cannot_update(self._manager, runner.model) or cannot_keep(runner.model)
            if reason:
                return reason, False
        if flush and compat.cannot_flush(self._manager):
            return (
                "requests still hold the cache, so it could not be flushed: pause the engine for the update "
                '(POST /pause_generation {"mode": "retract"}), wait for them, or keep the cache (flush_cache: false)'
            ), True
        return "", False

    def _receive(self, handles: Mapping[str, str], order: Order) -> Report:
        agreed: list[bool] = []

        def agree(verdict: Verdict) -> list[Verdict]:
            agreed.append(True)
            return self._workers.exchange(verdict, order.timeout + _GRACE_SECONDS)

        life, self._sink.admission.agree = self._sink.life, agree
        start, before = time.perf_counter(), life.brought_by
        error: Exception | None = None
        details: Details = {}
        try:
            details = self._take(handles, order)
        except Exception as caught:  # whatever it is, every worker must hear of it
            error = caught
            logger.exception("this worker could not take the update")
        if not agreed:
            # The others wait for this worker's word in their own `begin`.
            agree(Verdict(error=f"it has no link to the parameter server: {error}"))
        report = self._report(
            ok=error is None,
            phase="" if error is None else "update",
            error="" if error is None else f"{type(error).__name__}: {error}",
        )
        return msgspec.structs.replace(
            report,
            dirty=life.dirty,  # of its own weights
            complete=life.brought_by != before and not life.dirty,
            seconds=time.perf_counter() - start,
            details=details,
        )

    def _take(self, handles: Mapping[str, str], order: Order) -> Details:
        workers = self.position.world_size * self.position.replicas
        handle = pick_handle(handles, self._device, self.position.overall, workers)
        self._device.synchronize()  # a forward pass on another stream may still read the weights
        with ExitStack() as around:
            for runner in self._runners:
                around.enter_context(without_adapters(runner.model))
            cancel = around.enter_context(giving_up(order.give_up))
            received = receive_update(handle, self._sink, self._device, timeout=order.timeout, cancel=cancel)
        if received.verified != (order.do == "verify"):
            raise WorkerError("the parameter server and this request do not mean the same: update or comparison")
        return {**received.details, "nbytes": received.nbytes}

    def _hold_or_release(self) -> None:
        scheduler = compat.scheduler_of(self._manager)
        if self.dirty and not compat.is_paused(scheduler):
            compat.set_paused(scheduler, True)
            self._holds_engine = True
        elif not self.dirty and self._holds_engine:
            compat.set_paused(scheduler, False)
            self._holds_engine = False

    def _report(self, *, ok: bool, phase: str = "", error: str = "") -> Report:
        position = self.position
        return Report(
            rank=position.overall,
            ok=ok,
            dirty=self.dirty,
            version=self._sink.version,
            update=self._sink.life.brought_by,
            partial=self._sink.life.partial,
            whole_version=self._sink.life.whole_version,
            error=error,
            phase=phase,
            door=self._door,
            last_update=dict(self._last_update),
            role=f"tensor-parallel rank {position.rank % position.tensor_parallel_size}, stage {position.stage}, "
            f"replica {position.replica}",
            lost_hooks=self.lost_hooks,
        )


def _shortened(value: str | float) -> str | int | float:
    return value[:_LONGEST_WORD] if isinstance(value, str) else value
