"""The hooks in SGLang's serving process: the gate, and updates that reach every worker."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec

from checkpoint_engine.sdk import DeadlineError, EngineRequestError, limits
from checkpoint_engine.sdk.metrics import engine_metrics
from checkpoint_engine_sglang import __version__, compat, installation
from checkpoint_engine_sglang.endpoints import install
from checkpoint_engine_sglang.gate import ServingGate
from checkpoint_engine_sglang.giving_up import GiveUpFile
from checkpoint_engine_sglang.messages import (
    BUSY,
    Order,
    ReplicaReports,
    Report,
    decode_reports,
    failures_in,
    pack,
    unpack,
)
from checkpoint_engine_sglang.named_adapters import NamedAdapters

__all__ = ["ServerFront", "lost_hooks", "make_front", "update_weights_from_ipc"]

logger = logging.getLogger(__name__)

_FRONT = "_checkpoint_engine_front"
_HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_STATUS_SECONDS = 10.0
_OWN_REQUEST = "SGLang's /update_weights_from_ipc"
_IDLE_SECONDS = 3.0
"""For workers to notice that their last request has ended."""

lost_hooks: dict[str, str] = {}
"""Of this process."""


class ServerFront:
    """Stands beside SGLang's tokenizer manager."""

    def __init__(self, manager: Any) -> None:  # noqa: ANN401 - SGLang's own object
        self._manager = manager
        waiting = manager.initial_weights_loaded is False
        self.gate = ServingGate(
            waiting=waiting,
            keep_open=() if installation.ping_waits_for_weights() else ("/ping",),
            is_starting=lambda: compat.is_starting(manager),
        )
        self._updating = False
        self._run_under_way: asyncio.Future[tuple[list[Report], str]] | None = None
        self._give_up: GiveUpFile | None = None
        self._last: list[Report] = []
        self._stages = 1
        self._holds_requests = False
        self._status: asyncio.Task[list[Report]] | None = None
        self.adapters = NamedAdapters(manager, self._ask_for_adapter)

    @property
    def server_args(self) -> Any:  # noqa: ANN401 - SGLang's own
        """What SGLang was started with."""
        return self._manager.server_args

    @property
    def lost_hooks(self) -> dict[str, str]:
        """Of this process."""
        return lost_hooks

    # -- what it is asked for

    async def update(self, request: Any, *, wait_for_requests: bool) -> tuple[list[Report], str]:  # noqa: ANN401
        """Has all workers take an update, or compare their weights, as the request orders.

        With `wait_for_requests` an engine that is not paused finishes its running requests first.

        Returns:
            What the workers say, and what went wrong in all; empty if nothing did.
        """
        problem = "another update is under way; wait for it to end" if self._updating else _unsafe()
        if problem:
            return [], problem
        handles, order = unpack(request.zmq_handles)
        order = order or Order(version=request.weight_version or "", door=_OWN_REQUEST)
        self._give_up = GiveUpFile()
        order = msgspec.structs.replace(order, give_up=str(self._give_up.path))
        request.zmq_handles = pack(handles, order)
        if order.do == "verify":
            # Pipeline stages can only wait for each other while none of them has a batch.
            wait_for_requests = int(getattr(self._manager.server_args, "pp_size", 1)) > 1
        self._updating = True
        run = self._run(request, order, wait_for_requests=wait_for_requests)
        # Whoever asked may go away; what the workers then say must be heard all the same.
        self._run_under_way = asyncio.ensure_future(run)
        return await asyncio.shield(self._run_under_way)

    async def abort(self) -> tuple[list[Report], str]:
        """Has the workers give up the update, or comparison, under way.

        Returns:
            What they say of it, and how it ended; nothing if none is under way.

        Raises:
            DeadlineError: they have not given up yet, as while requests are waited for; they will.
        """
        if self._give_up is None or self._run_under_way is None:
            return [], ""
        self._give_up.appear()
        try:
            return await asyncio.wait_for(asyncio.shield(self._run_under_way), limits.SETTLE)
        except asyncio.TimeoutError:
            raise DeadlineError(
                f"the update has not ended within {limits.SETTLE:g} s; its workers give up once they get to it"
            ) from None

    async def _run(self, request: Any, order: Order, *, wait_for_requests: bool) -> tuple[list[Report], str]:  # noqa: ANN401
        late = ""
        try:
            answers = await self._ask_workers(request, wait_for_requests=wait_for_requests)
            reports, late = _reports(answers), "; ".join(filter(None, (answer.problem for answer in answers)))
            problem = failures_in(reports) or late
        except EngineRequestError as error:
            reports, problem = [], str(error)
        finally:
            self._updating = False
            if self._give_up is not None:
                self._give_up.close()
                self._give_up = None
        if order.do == "update":
            self._observe(reports, problem)
            await self._settle(reports, problem)
            if _all_complete(reports) and not late:
                self._after_success(request)
        return reports, problem

    async def status(self) -> dict[str, Any]:
        """What every worker holds, as JSON."""
        workers = await self._ask_status()
        return {
            "workers": [msgspec.to_builtins(worker) for worker in workers],
            "closed": self.gate.closed,
            "waiting": self.gate.waiting,
            "paused": bool(self._manager.is_pause),
            "dirty": bool(self.gate.mixture) or any(worker.dirty for worker in workers),
            "updating": self._updating,
            "weight_version": compat.weight_version(self._manager),
            "pipeline_stages": self._stages,
            "adapters": self.adapters.versions,
            "lost_hooks": lost_hooks,
            "sglang": installation.version(),
            "plugin": __version__,
        }

    # -- inside

    async def _ask_for_adapter(self, request: Any) -> str:  # noqa: ANN401
        return (await self.update(request, wait_for_requests=False))[1]

    def _observe(self, reports: list[Report], problem: str) -> None:
        """In SGLang's `/metrics`, where those are on."""
        metrics = engine_metrics() if getattr(self.server_args, "enable_metrics", False) else None
        if metrics is None:
            return
        if problem and all(report.ok for report in reports):
            metrics.failed("", "update")
        else:
            metrics.observe([{**report.details, **msgspec.structs.asdict(report)} for report in reports])

    async def _ask_workers(self, request: Any, *, wait_for_requests: bool) -> list[ReplicaReports]:  # noqa: ANN401
        manager = self._manager
        manager.auto_create_handle_loop()
        async with manager.is_pause_cond:
            # Held meanwhile, so that nobody lets the engine run again during the update.
            if manager.is_pause:
                return await self._ask_until_idle(request)
        if not wait_for_requests:
            return await self._ask_until_idle(request)
        async with manager.model_update_lock.writer_lock:
            return await self._ask_until_idle(request)

    async def _ask_until_idle(self, request: Any) -> list[ReplicaReports]:  # noqa: ANN401
        """Asks again while workers only say that a request has not quite ended."""
        end = time.monotonic() + _IDLE_SECONDS
        while True:
            answers = _decode(await self._manager.update_weights_from_ipc_communicator(request))
            busy = all(any(report.phase == BUSY for report in answer.reports) for answer in answers)
            if not busy or time.monotonic() > end:
                return answers
            await asyncio.sleep(0.05)

    async def _settle(self, reports: list[Report], problem: str) -> None:
        """Opens or closes the gate, after an update."""
        complete = _all_complete(reports)
        mixed = any(report.dirty or (report.complete and not complete) for report in reports)
        if reports:
            self._last = reports
        if mixed:
            self.gate.note_mixture(problem)
        elif complete:
            self.gate.note_success()
            self._manager.initial_weights_loaded = True
        manager = self._manager
        async with manager.is_pause_cond:
            if self.gate.mixture and not manager.is_pause:
                manager.is_pause, self._holds_requests = True, True
            elif not self.gate.mixture and self._holds_requests:
                manager.is_pause, self._holds_requests = False, False
                manager.is_pause_cond.notify_all()

    def _after_success(self, request: Any) -> None:  # noqa: ANN401
        manager = self._manager
        processor = getattr(manager, "mm_processor", None)
        if request.flush_cache and hasattr(processor, "clear_preprocess_cache"):
            cast("Any", processor).clear_preprocess_cache()
        if request.weight_version is not None:
            manager._update_weight_version_if_provided(request.weight_version)  # noqa: SLF001 - as SGLang itself does

    async def _ask_status(self) -> list[Report]:
        if self._updating:
            return self._busy()
        if _unsafe():
            raise EngineRequestError(_unsafe())
        if self._status is None or self._status.done():
            # A task of its own: a request that is given up half-way would leave its answer to the next one.
            self._status = asyncio.ensure_future(self._fetch_status())
        try:
            self._last = await asyncio.wait_for(asyncio.shield(self._status), _STATUS_SECONDS)
        except asyncio.TimeoutError:
            return self._busy()
        return self._last

    async def _fetch_status(self) -> list[Report]:
        manager = self._manager
        manager.auto_create_handle_loop()
        request = compat.request_type()(zmq_handles=pack({}, Order(do="status")), flush_cache=False)
        answers = _decode(await manager.update_weights_from_ipc_communicator(request))
        self._stages = max(answer.stages for answer in answers)
        return _reports(answers)

    def _busy(self) -> list[Report]:
        return [msgspec.structs.replace(report, updating=True) for report in self._last]


# -- the hooks, as SGLang calls them --------------------------------------------------------------------------------


def make_front(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Around the place where SGLang makes ready for updates of the weights, in the process that serves people."""
    done = original(manager, *args, **kwargs)
    front = ServerFront(manager)
    setattr(manager, _FRONT, front)
    if _HTTP_SERVER in sys.modules:
        install(sys.modules[_HTTP_SERVER], front)
    return done


async def update_weights_from_ipc(
    original: Callable[..., Any],
    manager: Any,  # noqa: ANN401
    obj: Any,  # noqa: ANN401
    request: Any = None,  # noqa: ANN401
) -> tuple[bool, str]:
    """Around SGLang's own request for an update: its users get the same promises."""
    front = cast("ServerFront | None", getattr(manager, _FRONT, None))
    if front is None:
        return await original(manager, obj, request)
    reports, problem = await front.update(obj, wait_for_requests=True)
    if problem:
        closed = f"; {front.gate.closed}" if front.gate.closed else ""
        return False, f"{problem}{closed}"
    return True, f"All {len(reports)} workers hold the new weights."


def _unsafe() -> str:
    """Why workers cannot be asked: without these hooks they would do as SGLang's own do. Empty if they can."""
    lost = [reason for name, reason in lost_hooks.items() if name in ("workers", "runner")]
    return f"this SGLang ({installation.version()}) cannot be updated safely: {'; '.join(lost)}" if lost else ""


def _all_complete(reports: list[Report]) -> bool:
    """Whether all workers hold the weights that they were asked to take, also where one could not say so in time."""
    return bool(reports) and all(report.complete for report in reports)


def _reports(answers: list[ReplicaReports]) -> list[Report]:
    """Of every worker, once: with data-parallel attention each group of workers answers for all of them."""
    reports = {report.rank: report for answer in answers for report in answer.reports}
    return [reports[rank] for rank in sorted(reports)]


def _decode(answers: list[Any]) -> list[ReplicaReports]:
    return [decode_reports(answer.message) for answer in answers]
