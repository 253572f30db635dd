"""The hooks in SGLang's serving process: routes of ours, the gate, and updates that reach every worker."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import msgspec

from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine_sglang import __version__, compat, places, routes
from checkpoint_engine_sglang.gate import Gate, GateMiddleware
from checkpoint_engine_sglang.messages import (
    BUSY,
    DEFAULT_SECONDS,
    Answer,
    Order,
    Report,
    decode_answer,
    describe_failures,
    pack,
    unpack,
)

logger = logging.getLogger(__name__)

_FRONT = "_checkpoint_engine_front"
_HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_STATUS_SECONDS = 10.0
_UPDATE_FAILED = 500
_IDLE_SECONDS = 3.0
"""For workers to notice that their last request has ended."""

lost_hooks: dict[str, str] = {}
"""Of this process."""


class Body(msgspec.Struct):
    """What a client sends to be updated."""

    handles: list[tuple[str, str]]
    """Device identity and handle of every worker, in order of rank."""
    version: str = ""
    timeout: float = DEFAULT_SECONDS
    wait_for_requests: bool = True
    flush_cache: bool = True
    torch_empty_cache: bool = False
    verify: bool = False
    """Whether weights are only compared with the checkpoint."""


class Front:
    """Stands beside SGLang's tokenizer manager."""

    def __init__(self, manager: Any) -> None:  # noqa: ANN401 - SGLang's own object
        self._manager = manager
        waiting = manager.initial_weights_loaded is False
        self.gate = Gate(waiting=waiting, keep_open=() if places.ping_waits_for_weights() else ("/ping",))
        self._updating = False
        self._last: list[Report] = []
        self._stages = 1
        self._holds_requests = False
        self._status: asyncio.Task[list[Report]] | None = None

    # -- what it is asked for

    async def update(self, request: Any, *, wait_for_requests: bool) -> tuple[list[Report], str]:  # noqa: ANN401
        """Has all workers take an update; returns what they say, and what went wrong in all, empty if nothing.

        With `wait_for_requests` an engine that is not paused finishes its running requests first.
        """
        if self._updating:
            return [], "another update is under way; wait for it to end"
        if _unsafe():
            return [], _unsafe()
        self._updating = True
        # Whoever asked may go away; what the workers then say must be heard all the same.
        return await asyncio.shield(asyncio.ensure_future(self._update(request, wait_for_requests=wait_for_requests)))

    async def _update(self, request: Any, *, wait_for_requests: bool) -> tuple[list[Report], str]:  # noqa: ANN401
        handles, order = unpack(request.zmq_handles)
        request.zmq_handles = pack(handles, order or Order(version=request.weight_version or ""))
        try:
            answers = await self._ask_workers(request, wait_for_requests=wait_for_requests)
            reports = _reports(answers)
            problem = describe_failures(reports) or "; ".join(filter(None, (answer.problem for answer in answers)))
        except EngineRequestError as error:
            reports, problem = [], str(error)
        finally:
            self._updating = False
        await self._settle(reports, problem)
        if not problem:
            self._after_success(request)
        return reports, problem

    async def verify(self, request: Any) -> tuple[list[Report], str]:  # noqa: ANN401
        """Has all workers compare their weights; returns what they say, and what went wrong in all."""
        if self._updating:
            return [], "an update is under way; wait for it to end"
        if _unsafe():
            return [], _unsafe()
        self._updating = True
        return await asyncio.shield(asyncio.ensure_future(self._verify(request)))

    async def _verify(self, request: Any) -> tuple[list[Report], str]:  # noqa: ANN401
        try:
            # Pipeline stages can only wait for each other while none of them has a batch.
            stages = int(getattr(self._manager.server_args, "pp_size", 1))
            reports = _reports(await self._ask_workers(request, wait_for_requests=stages > 1))
        except EngineRequestError as error:
            return [], str(error)
        finally:
            self._updating = False
        return reports, describe_failures(reports)

    async def status(self) -> dict[str, Any]:
        """What every worker holds, as JSON."""
        workers = await self._ask_status()
        return {
            "workers": [msgspec.to_builtins(worker) for worker in workers],
            "closed": self.gate.closed,
            "waiting": self.gate.waiting,
            "dirty": bool(self.gate.mixture) or any(worker.dirty for worker in workers),
            "updating": self._updating,
            "pipeline_stages": self._stages,
            "lost_hooks": lost_hooks,
            "sglang": places.version(),
            "plugin": __version__,
        }

    # -- inside

    async def _ask_workers(self, request: Any, *, wait_for_requests: bool) -> list[Answer]:  # noqa: ANN401
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

    async def _ask_until_idle(self, request: Any) -> list[Answer]:  # noqa: ANN401
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
        done = [report.ok for report in reports]
        mixed = any(report.dirty for report in reports) or (any(done) and not all(done))
        if reports:
            self._last = reports
        if mixed:
            self.gate.note_mixture(problem)
        elif done and all(done):
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
    front = Front(manager)
    setattr(manager, _FRONT, front)
    if _HTTP_SERVER in sys.modules:
        install_routes(sys.modules[_HTTP_SERVER], front)
    return done


async def update_weights_from_ipc(
    original: Callable[..., Any],
    manager: Any,  # noqa: ANN401
    obj: Any,  # noqa: ANN401
    request: Any = None,  # noqa: ANN401
) -> tuple[bool, str]:
    """Around SGLang's own request for an update: its users get the same promises."""
    front = cast("Front | None", getattr(manager, _FRONT, None))
    if front is None:
        return await original(manager, obj, request)
    reports, problem = await front.update(obj, wait_for_requests=True)
    if problem:
        closed = f"; {front.gate.closed}" if front.gate.closed else ""
        return False, f"{problem}{closed}"
    return True, f"All {len(reports)} workers hold the new weights."


def install_routes(server: Any, front: Front) -> None:  # noqa: ANN401 - SGLang's module
    """Adds our routes and the gate to SGLang's application, before it starts."""
    app = server.app
    responses = importlib.import_module("starlette.responses")
    admin = _admin_level()

    async def get_status(request: Any) -> Any:  # noqa: ANN401
        del request
        try:
            return responses.JSONResponse(await front.status())
        except EngineRequestError as error:
            return responses.JSONResponse({"error": str(error), "lost_hooks": lost_hooks}, _UPDATE_FAILED)

    async def post_update(request: Any) -> Any:  # noqa: ANN401
        try:
            body = msgspec.json.decode(await request.body(), type=Body)
        except msgspec.MsgspecError as error:
            return responses.JSONResponse({"error": f"not as expected: {error}"}, 422)
        order = Order("verify" if body.verify else "update", body.version, body.timeout)
        asked = compat.request_type()(
            zmq_handles=pack(dict(body.handles), order),
            flush_cache=body.flush_cache,
            weight_version=body.version or None,
            torch_empty_cache=body.torch_empty_cache,
        )
        if body.verify:
            reports, problem = await front.verify(asked)
        else:
            reports, problem = await front.update(asked, wait_for_requests=body.wait_for_requests)
        content = {
            "ok": not problem,
            "error": problem,
            "results": [msgspec.to_builtins(report) for report in reports],
            "closed": front.gate.closed,
        }
        return responses.JSONResponse(content, _UPDATE_FAILED if problem else 200)

    app.add_route(routes.STATUS, admin(get_status), methods=["GET"])
    app.add_route(routes.UPDATE, admin(post_update), methods=["POST"])
    app.add_middleware(GateMiddleware, gate=front.gate)
    _end_with(app, front.gate)
    seconds = float(getattr(server, "WAIT_WEIGHTS_READY_TIMEOUT", 120))

    def wait_weights_ready() -> None:
        if not front.gate.wait_until_opened(seconds):
            raise SystemExit  # ends this thread alone: the server is shutting down

    server._wait_weights_ready = wait_weights_ready  # noqa: SLF001 - SGLang's own opens after the time-out


def _end_with(app: Any, gate: Gate) -> None:  # noqa: ANN401
    """SGLang joins the thread that waits for weights when it shuts down; so that must end first."""
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(application: Any) -> AsyncGenerator[Any]:  # noqa: ANN401
        async with inner(application) as state:
            try:
                yield state
            finally:
                gate.end()

    app.router.lifespan_context = lifespan


def _admin_level() -> Callable[[Any], Any]:
    """SGLang's mark for routes that ask for the administrator's key, where one is set."""
    try:
        auth = importlib.import_module("sglang.srt.utils.auth")
        return auth.auth_level(auth.AuthLevel.ADMIN_OPTIONAL)
    except (ImportError, AttributeError):
        return lambda function: function


def _unsafe() -> str:
    """Why workers cannot be asked: without these hooks they would do as SGLang's own do. Empty if they can."""
    lost = [reason for name, reason in lost_hooks.items() if name in ("workers", "runner")]
    return f"this SGLang ({places.version()}) cannot be updated safely: {'; '.join(lost)}" if lost else ""


def _reports(answers: list[Answer]) -> list[Report]:
    """Of every worker, once: with data-parallel attention each group of workers answers for all of them."""
    reports = {report.rank: report for answer in answers for report in answer.reports}
    return [reports[rank] for rank in sorted(reports)]


def _decode(answers: list[Any]) -> list[Answer]:
    return [decode_answer(answer.message) for answer in answers]
