"""Our routes in SGLang's HTTP server, and the gate before all of its routes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from checkpoint_engine.sdk import DeadlineError, EngineRequestError, limits
from checkpoint_engine.sdk.access import TOKEN_VARIABLE, Access, RefusedError
from checkpoint_engine_sglang import compat, routes
from checkpoint_engine_sglang.gate import GateMiddleware, ServingGate
from checkpoint_engine_sglang.messages import Order, Report, pack

if TYPE_CHECKING:
    from checkpoint_engine_sglang.front import ServerFront

__all__ = ["AdapterBody", "Body", "Endpoints", "access_of", "install"]

logger = logging.getLogger(__name__)

_BAD, _FAILED, _LATE = 422, 500, 504

_Words = TypeVar("_Words", bound=msgspec.Struct)
_Answer = tuple[dict[str, Any], int]
"""Content, and HTTP status."""


class Body(msgspec.Struct):
    """What a client sends to be updated, or compared."""

    handles: list[tuple[str, str]]
    """Device identity and handle of every worker, in order of rank."""
    version: str = ""
    timeout: float = limits.UPDATE
    wait_for_requests: bool = True
    flush_cache: bool = True
    torch_empty_cache: bool = False
    verify: bool = False
    """As `/checkpoint_engine/verify` does; from clients that do not know that route."""


class AdapterBody(msgspec.Struct):
    """What a client sends to have a LoRA adapter taken."""

    name: str
    directory: str
    version: str = ""


class Endpoints:
    """What our routes do."""

    def __init__(self, front: ServerFront, access: Access) -> None:
        self._front = front
        self._access = access

    async def status(self, request: Any) -> _Answer:  # noqa: ANN401 - Starlette's own
        """What every worker holds."""
        del request
        return await self._front.status(), 200

    async def update(self, request: Any) -> _Answer:  # noqa: ANN401
        """Has all workers take an update."""
        return await self._carry_out(await _read(request, Body), routes.UPDATE)

    async def verify(self, request: Any) -> _Answer:  # noqa: ANN401
        """Has all workers compare their weights."""
        body = await _read(request, Body)
        body.verify = True
        return await self._carry_out(body, routes.VERIFY)

    async def adapter(self, request: Any) -> _Answer:  # noqa: ANN401
        """Has all workers take a LoRA adapter."""
        body = await _read(request, AdapterBody)
        await self._front.adapters.take(body.name, body.directory, body.version)
        return {"adapters": self._front.adapters.versions}, 200

    async def abort(self, request: Any) -> _Answer:  # noqa: ANN401
        """Gives up what is under way."""
        del request
        reports, problem = await self._front.abort()
        return {"aborted": bool(reports or problem), "error": problem, "results": _plain(reports)}, 200

    async def _carry_out(self, body: Body, door: str) -> _Answer:
        order = Order("verify" if body.verify else "update", body.version, body.timeout, door)
        asked = compat.request_type()(
            zmq_handles=pack(dict(body.handles), order),
            flush_cache=body.flush_cache,
            weight_version=body.version or None,
            torch_empty_cache=body.torch_empty_cache,
        )
        reports, problem = await self._front.update(asked, wait_for_requests=body.wait_for_requests)
        closed = self._front.gate.closed
        content = {"ok": not problem, "error": problem, "results": _plain(reports), "closed": closed}
        return content, _FAILED if problem else 200

    def as_route(self, handler: Callable[[Any], Awaitable[_Answer]]) -> Callable[[Any], Awaitable[Any]]:
        """For Starlette: checks who asks, and answers in JSON whatever happens."""
        responses = importlib.import_module("starlette.responses")

        async def answer(request: Any) -> Any:  # noqa: ANN401
            try:
                here = request.scope.get("server")
                self._access.check(request.headers, request.client and request.client.host, here and here[0])
                content, status = await handler(request)
            except RefusedError as refused:
                content, status = {"error": str(refused)}, refused.status
            except (EngineRequestError, DeadlineError) as error:
                late = isinstance(error, DeadlineError)
                content, status = (
                    {"error": str(error), "lost_hooks": self._front.lost_hooks},
                    _LATE if late else _FAILED,
                )
            return responses.JSONResponse(content, status)

        return answer


def install(server: Any, front: ServerFront) -> None:  # noqa: ANN401 - SGLang's module
    """Adds our routes and the gate to SGLang's application, before it starts."""
    app = server.app
    admin = _admin_level()
    access = access_of(front.server_args)
    endpoints = Endpoints(front, access)
    for path, method, handler in (
        (routes.STATUS, "GET", endpoints.status),
        (routes.UPDATE, "POST", endpoints.update),
        (routes.VERIFY, "POST", endpoints.verify),
        (routes.ABORT, "POST", endpoints.abort),
        (routes.ADAPTER, "POST", endpoints.adapter),
    ):
        app.add_route(path, admin(endpoints.as_route(handler)), methods=[method])
    logger.info("updates of weights are taken at %s by %s", routes.UPDATE, access.describe())
    app.add_middleware(GateMiddleware, gate=front.gate)
    _end_with(app, front.gate)
    seconds = float(getattr(server, "WAIT_WEIGHTS_READY_TIMEOUT", 120))

    def wait_weights_ready() -> None:
        if not front.gate.wait_until_opened(seconds):
            raise SystemExit  # ends this thread alone: the server is shutting down

    server._wait_weights_ready = wait_weights_ready  # noqa: SLF001 - SGLang's own opens after the time-out


def access_of(server_args: Any) -> Access:  # noqa: ANN401 - SGLang's own
    """By what SGLang was started with: the administrator's key if it has one, else its only one."""
    administrators = str(getattr(server_args, "admin_api_key", None) or "")
    key = administrators or str(getattr(server_args, "api_key", None) or "")
    option = "--api-key" if key and not administrators else "--admin-api-key"
    return Access([key] if key else [], os.environ.get(TOKEN_VARIABLE) or None, engine="SGLang", option=option)


async def _read(request: Any, kind: type[_Words]) -> _Words:  # noqa: ANN401
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.MsgspecError as error:
        raise RefusedError(_BAD, f"not as expected: {error}") from error


def _plain(reports: list[Report]) -> list[Any]:
    return [msgspec.to_builtins(report) for report in reports]


def _end_with(app: Any, gate: ServingGate) -> None:  # noqa: ANN401
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
