"""One worker of SGLang: takes updates together with all other workers of its engine, or none of them does."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from checkpoint_engine.engine.receiver import pick_handle, receive_update
from checkpoint_engine.errors import WorkerError
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.adapter import SGLangAdapter, Verdict
from checkpoint_engine_sglang.agreement import Pending, Workers
from checkpoint_engine_sglang.compat import Position, Runner
from checkpoint_engine_sglang.messages import BUSY, Order, Report, describe_failures

logger = logging.getLogger(__name__)

_LONGEST_WORD = 1000
"""Characters of an error, or of a version, in a status that nobody waits for: the room for it is small."""
_GRACE_SECONDS = 60.0
"""Workers that run into the deadline themselves get this much longer to say so."""


class Readiness(msgspec.Struct, frozen=True):
    """Whether a worker could begin an update, before it connects to anybody."""

    error: str = ""
    busy: bool = False
    """Whether it only has to be asked again."""


class Worker:
    """What is kept beside a worker from one update to the next.

    Its methods are called on all workers of a replica at once, and exchange words with them a fixed number of times,
    whatever happens: a worker that fell out of step would leave the others waiting for ever.
    """

    def __init__(self, manager: Any, runners: Sequence[Runner], workers: Workers) -> None:  # noqa: ANN401
        self._manager = manager
        self._runners = runners
        self._workers = workers
        self.position: Position = compat.position_of(manager)
        self._device = compat.device_of(manager, self.position)
        self._adapter = SGLangAdapter(runners, self.position.tensor_parallel_size)
        self._mixed = False
        """Whether the workers of this engine hold different versions."""
        self._error = ""
        self._holds_engine = False
        self.lost_hooks: dict[str, str] = {}

    @property
    def dirty(self) -> bool:
        """Whether the engine's weights may be a mixture."""
        return self._adapter.dirty or self._mixed

    def status(self) -> list[Report]:
        """What every worker holds."""
        return self._workers.exchange(self._report(ok=True, error=self._error), _GRACE_SECONDS)

    def start_status(self) -> Pending[Report]:
        """The same, without waiting for anybody."""
        report = self._report(ok=True, error=self._error[:_LONGEST_WORD])
        return self._workers.start(msgspec.structs.replace(report, version=report.version[:_LONGEST_WORD]))

    def update(self, handles: Mapping[str, str], order: Order, *, flush: bool) -> list[Report]:
        """Takes an update; returns what every worker says of it.

        Either all workers report success, or no caller will be told so.
        """
        start = time.perf_counter()
        refused = self._refused(handles, order, flush=flush)
        if refused:
            reports = refused
        else:
            report = self._receive(handles, order)
            reports = self._workers.exchange(report, order.timeout + _GRACE_SECONDS)
            done = [report.ok for report in reports]
            if all(done):
                self._mixed = False
            elif any(done) or any(report.dirty for report in reports):
                self._mixed = True
            reports = [msgspec.structs.replace(report, dirty=self._mixed or report.dirty) for report in reports]
        failures = describe_failures(reports)
        self._error = failures
        self._hold_or_release()
        if failures:
            logger.error("update of the weights failed: %s; %s", failures, self._describe())
        else:
            logger.info("weights updated to version %r in %.2f s", order.version, time.perf_counter() - start)
        return reports

    def verify(self, handles: Mapping[str, str], order: Order) -> list[Report]:
        """Compares the weights with a checkpoint; returns what every worker found, in its `details`."""
        refused = self._refused(handles, order, flush=False)
        return refused or self._workers.exchange(self._receive(handles, order), order.timeout + _GRACE_SECONDS)

    def stay_paused_if_dirty(self) -> None:
        """Keeps the scheduler from running requests with a mixture, whoever told it to go on."""
        if self.dirty:
            compat.set_paused(compat.scheduler_of(self._manager), True)
            self._holds_engine = True

    # -- inside

    def _refused(self, handles: Mapping[str, str], order: Order, *, flush: bool) -> list[Report]:
        """The reports of all workers if one of them cannot begin; nothing has changed then."""
        readiness = self._readiness(handles, flush=flush)
        everybody = self._workers.exchange(readiness, order.timeout + _GRACE_SECONDS)
        if not any(one.error for one in everybody):
            return []
        phase = BUSY if readiness.busy else "prepare"
        mine = self._report(ok=not readiness.error, phase=phase, error=readiness.error)
        return self._workers.exchange(mine, _GRACE_SECONDS)

    def _readiness(self, handles: Mapping[str, str], *, flush: bool) -> Readiness:
        try:
            pick_handle(handles, self._device, self.position.overall, self.position.world_size * self.position.replicas)
        except WorkerError as error:
            return Readiness(str(error))
        for runner in self._runners:
            reason = compat.cannot_update(self._manager, runner.model)
            if reason:
                return Readiness(reason)
        if flush and compat.cannot_flush(self._manager):
            return Readiness(
                "requests still hold the cache, so it could not be flushed: pause the engine for the update "
                '(POST /pause_generation {"mode": "retract"}), wait for them, or keep the cache (flush_cache: false)',
                busy=True,
            )
        return Readiness()

    def _receive(self, handles: Mapping[str, str], order: Order) -> Report:
        agreed: list[bool] = []

        def agree(verdict: Verdict) -> list[Verdict]:
            agreed.append(True)
            return self._workers.exchange(verdict, order.timeout + _GRACE_SECONDS)

        self._adapter.agree = agree
        start = time.perf_counter()
        error: Exception | None = None
        details: dict[str, str | int | float] = {}
        try:
            workers = self.position.world_size * self.position.replicas
            handle = pick_handle(handles, self._device, self.position.overall, workers)
            self._device.synchronize()  # a forward pass on another stream may still read the weights
            received = receive_update(handle, self._adapter, self._device, timeout=order.timeout)
            details = {**received.details, "nbytes": received.nbytes}
            if received.verified != (order.do == "verify"):
                error = WorkerError("the parameter server and this request do not mean the same: update or comparison")
        except Exception as caught:  # whatever it is, every worker must hear of it
            error = caught
            logger.exception("this worker could not take the update")
        if not agreed:
            # The others wait for this worker's word in their own `begin`.
            agree(Verdict(error=f"it has no link to the parameter server: {error}"))
        return self._report(
            ok=error is None,
            phase="" if error is None else "update",
            error="" if error is None else f"{type(error).__name__}: {error}",
            seconds=time.perf_counter() - start,
            details=details,
            alone=True,
        )

    def _hold_or_release(self) -> None:
        scheduler = compat.scheduler_of(self._manager)
        if self.dirty and not compat.is_paused(scheduler):
            compat.set_paused(scheduler, True)
            self._holds_engine = True
        elif not self.dirty and self._holds_engine:
            compat.set_paused(scheduler, False)
            self._holds_engine = False

    def _describe(self) -> str:
        if self.dirty:
            return "the engine may hold a mixture of old and new weights, and stays closed until an update succeeds"
        return f"this worker still holds version {self._adapter.version!r}"

    def _report(
        self,
        *,
        ok: bool,
        phase: str = "",
        error: str = "",
        seconds: float = 0.0,
        details: dict[str, str | int | float] | None = None,
        alone: bool = False,
    ) -> Report:
        """`alone`: says of `dirty` what holds for this worker's own weights."""
        place = self.position
        return Report(
            rank=place.overall,
            ok=ok,
            dirty=self._adapter.dirty if alone else self.dirty,
            version=self._adapter.version,
            error=error,
            phase=phase,
            seconds=seconds,
            details=details or {},
            role=f"tensor-parallel rank {place.rank % place.tensor_parallel_size}, stage {place.stage}, "
            f"replica {place.replica}",
            lost_hooks=self.lost_hooks,
        )
