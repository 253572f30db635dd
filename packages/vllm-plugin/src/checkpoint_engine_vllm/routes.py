"""Routes of our own in `vllm serve` (0.26 and newer), for whoever may: no development mode is needed.

    VLLM_PLUGINS=checkpoint_engine vllm serve MODEL --api-key KEY

That variable is vLLM's list of all plugins that it loads, of whatever kind; routes are only added if it names them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from argparse import Namespace
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, cast

import msgspec

from checkpoint_engine.sdk import limits
from checkpoint_engine.sdk.metrics import engine_metrics
from checkpoint_engine_vllm import __version__, access, compat
from checkpoint_engine_vllm.access import Access, RefusedError
from checkpoint_engine_vllm.data_parallel import ask_all_workers
from checkpoint_engine_vllm.place import workers_reached
from checkpoint_engine_vllm.served_adapters import ServedAdapters

__all__ = ["PREFIX", "Routes"]

PREFIX = "/v1/checkpoint_engine"
"""Of all routes; what lies below `/v1` is guarded by vLLM's own key."""

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see

_BAD, _FAILED, _MISSING = 400, 500, 404


class _Body(msgspec.Struct, frozen=True):
    """Of every request; each route uses what it needs."""

    handles: dict[str, str] = {}
    version: str = ""
    timeout: float = limits.UPDATE
    mode: str = "keep"
    clear_cache: bool = True
    name: str = ""
    directory: str = ""


class Routes:
    """What vLLM's entry-point group `vllm.endpoint_plugins` asks for."""

    name = "checkpoint_engine"
    required_tasks = None

    def __init__(self) -> None:
        self._access: Access = access.closed()
        self._served: Any = None
        self._adapters = ServedAdapters(None, Namespace())

    def attach_router(self, app: Any) -> None:  # noqa: ANN401 - FastAPI's application
        """Adds the routes."""
        app.add_api_route(PREFIX, self._route(self._about), methods=["GET"])
        app.add_api_route(f"{PREFIX}/status", self._route(self._status), methods=["GET"])
        for name, handler in {
            "update": self._update,
            "verify": self._verify,
            "abort": self._abort,
            "adapter": self._adapter,
            "pause": self._pause,
            "resume": self._resume,
            "reset_caches": self._reset_caches,
            "weight_version": self._publish,
        }.items():
            app.add_api_route(f"{PREFIX}/{name}", self._route(handler), methods=["POST"])

    async def init_state(self, engine_client: Any, state: object, args: Namespace) -> None:  # noqa: ANN401 - vLLM's own
        """Told by vLLM what it serves, and with which keys."""
        self._served = engine_client
        self._adapters = ServedAdapters(state, args)
        self._access = access.of_vllm(args)
        logger.info("updates of weights are taken at %s by %s", PREFIX, self._access.describe())

    # -- one route each

    async def _about(self, body: _Body) -> object:
        del body
        return {"plugin": __version__, "vllm": compat.version()}

    async def _status(self, body: _Body) -> object:
        del body
        engine = self._engine
        version = getattr(engine, "get_weight_version", None)
        return {
            "workers": await self._workers("checkpoint_engine_status", limits.SETTLE),
            "world_size": workers_reached(engine.vllm_config.parallel_config),
            "paused": await engine.is_paused(),
            "weight_version": await version() if version is not None else None,
            "adapters": self._adapters.versions,
        }

    async def _update(self, body: _Body) -> object:
        with _measured("update"), _counted():
            results = await self._take(body)
        _observe(results)
        return {"results": results}

    async def _verify(self, body: _Body) -> object:
        return {"results": await self._take(body)}

    async def _abort(self, body: _Body) -> object:
        del body
        return {"results": await self._workers("checkpoint_engine_abort", limits.SETTLE)}

    async def _adapter(self, body: _Body) -> object:
        await self._adapters.take(self._engine, body.name, body.directory, body.version)
        return {"adapters": self._adapters.versions}

    async def _pause(self, body: _Body) -> object:
        await self._engine.pause_generation(mode=body.mode, clear_cache=body.clear_cache)
        return {"paused": True}

    async def _resume(self, body: _Body) -> object:
        del body
        await self._engine.resume_generation()
        return {"paused": False}

    async def _reset_caches(self, body: _Body) -> object:
        del body
        done = await self._engine.reset_prefix_cache(reset_running_requests=True)
        await self._engine.reset_mm_cache()
        await self._engine.reset_encoder_cache()
        return {"success": bool(done)}

    async def _publish(self, body: _Body) -> object:
        publish = getattr(self._engine, "update_weight_version", None)
        if publish is None:
            raise RefusedError(_MISSING, "this vLLM keeps no version of its weights (0.27 and newer do)")
        await publish(body.version)
        return {"weight_version": body.version}

    # -- inside

    async def _take(self, body: _Body) -> object:
        if not body.handles:
            raise RefusedError(_BAD, "`handles` (device -> handle, as the parameter server gives them) is missing")
        arguments = (body.handles, body.version, body.timeout)
        return await self._workers("checkpoint_engine_update", body.timeout, *arguments)

    @property
    def _engine(self) -> Any:  # noqa: ANN401 - vLLM's own
        if self._served is None:
            raise RefusedError(_MISSING, "this server has no engine")
        return self._served

    async def _workers(self, method: str, timeout: float, *arguments: object) -> object:
        return await ask_all_workers(self._engine, method, timeout, arguments)

    def _route(self, handler: Callable[[_Body], Awaitable[object]]) -> Callable[[Any], Awaitable[object]]:
        responses: Any = importlib.import_module("starlette.responses")

        async def answer(request: Any) -> object:  # noqa: ANN401 - Starlette's own
            try:
                asked = request.scope.get("server")
                self._access.check(request.headers, request.client and request.client.host, asked and asked[0])
                content = await handler(_read(await request.body()))
            except RefusedError as refused:
                return responses.JSONResponse({"error": str(refused)}, status_code=refused.status)
            except Exception as error:
                logger.exception("%s failed", request.url.path)
                return responses.JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=_FAILED)
            return responses.JSONResponse(content)

        # FastAPI finds out by this what to give.
        answer.__annotations__ = {"request": importlib.import_module("starlette.requests").Request}
        return answer


def _read(raw: bytes) -> _Body:
    try:
        return msgspec.json.decode(raw, type=_Body) if raw.strip() else _Body()
    except msgspec.MsgspecError as error:
        raise RefusedError(_BAD, f"the request is not understood: {error}") from error


def _observe(results: object) -> None:
    """Ours, in vLLM's `/metrics`; comparisons change nothing and are left out."""
    reports = cast("list[dict[str, Any]]", results)
    metrics = None if any(report.get("verified") for report in reports) else engine_metrics()
    if metrics is not None:
        metrics.observe(reports)


@contextlib.contextmanager
def _counted() -> Generator[None]:
    """An update of which no worker tells, as when the engine has died or is late, counts as a failure, too."""
    try:
        yield
    except RefusedError:  # nobody was asked
        raise
    except Exception as error:
        metrics = engine_metrics()
        if metrics is not None:
            metrics.failed(type(error).__name__, "update")
        raise


def _measured(operation: str) -> AbstractContextManager[None]:
    """VLLM's own figures of updates, where it has some (0.32 and newer)."""
    try:
        metrics: Any = importlib.import_module("vllm.entrypoints.rl.online.metrics")
        return cast("AbstractContextManager[None]", metrics.weight_operation_metrics().record(operation))
    except (ImportError, AttributeError):
        return contextlib.nullcontext()
