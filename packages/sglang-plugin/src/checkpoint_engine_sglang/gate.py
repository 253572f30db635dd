"""Keeps people from being answered with weights that are not there yet, or not whole."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from checkpoint_engine_sglang import routes

__all__ = ["App", "GateMiddleware", "Receive", "Scope", "Send", "ServingGate"]

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ALWAYS_OPEN = frozenset(
    {
        # what brings the weights
        routes.STATUS,
        routes.UPDATE,
        routes.VERIFY,
        routes.ABORT,
        "/update_weights_from_ipc",
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/begin_weight_update",
        "/end_weight_update",
        "/update_weight_version",
        "/pause_generation",
        "/abort_request",
        "/flush_cache",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/freeze_gc",
        # what only looks
        "/model_info",
        "/get_model_info",
        "/server_info",
        "/get_server_info",
        "/weights_checker",
        "/get_weights_by_name",
        "/get_internal_state",
        "/metrics",
        "/openapi.json",
        "/docs",
    }
)
"""Everything else is closed, so that a route that a later SGLang adds is, too."""

_WHILE_WAITING = frozenset({"/continue_generation"})
"""Not when the weights are a mixture: then nothing may run."""


_HEALTH = frozenset({"/health", "/health_generate"})
"""What SGLang answers with an empty 503 until it has warmed up."""


class ServingGate:
    """Open or closed, for everything that answers people or says that it could."""

    def __init__(
        self, *, waiting: bool, keep_open: Iterable[str] = (), is_starting: Callable[[], bool] = lambda: False
    ) -> None:
        """Closed from the start if `waiting` for the first weights; `is_starting` says that SGLang warms up."""
        self.waiting = waiting
        self._is_starting = is_starting
        self.mixture = ""
        """Why the weights are not whole; empty if they are."""
        self._timed_out = 0.0
        self._kept_open = frozenset(keep_open)
        self._opened = threading.Event()
        self._ending = threading.Event()
        if not waiting:
            self._opened.set()

    @property
    def closed(self) -> str:
        """Why it is closed; empty if it is open."""
        if self.mixture:
            return f"the weights may be a mixture of old and new ({self.mixture}): update again"
        if self.waiting and self._timed_out:
            return (
                f"the initial weights have not come within {self._timed_out:g} s (SGLANG_WAIT_WEIGHTS_READY_TIMEOUT); "
                "still closed until they do: checkpoint-engine update"
            )
        if self.waiting:
            return "waiting for the initial weights (--wait-for-initial-weights): checkpoint-engine update"
        return ""

    def refuses(self, path: str) -> str:
        """Why a path is closed now; empty if it is open."""
        path = path.rstrip("/") or "/"
        if path in _ALWAYS_OPEN or path in self._kept_open or (path in _WHILE_WAITING and not self.mixture):
            return ""
        if not self.closed and path in _HEALTH and self._is_starting():
            return "the weights are there; SGLang warms up, which takes seconds"
        return self.closed

    def note_success(self) -> None:
        """All workers hold the same complete version."""
        self.waiting, self.mixture = False, ""
        self._opened.set()

    def note_mixture(self, why: str) -> None:
        """Some workers hold something else than others, or part of something."""
        self.mixture = why

    def wait_until_opened(self, seconds: float) -> bool:
        """Blocks until the first weights are there; says so at every `seconds` without them. False at shutdown."""
        start = time.monotonic()
        while not self._opened.wait(0.2):
            if self._ending.is_set():
                return False
            waited = time.monotonic() - start
            if waited >= seconds + self._timed_out:
                self._timed_out += seconds
                logger.error("no initial weights within %g s: the server stays closed until they come", self._timed_out)
        return True

    def end(self) -> None:
        """Lets go whoever waits: the server ends."""
        self._ending.set()


class GateMiddleware:
    """Answers 503 with the reason, before SGLang sees the request."""

    def __init__(self, app: App, gate: ServingGate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        reason = self._gate.refuses(str(scope["path"]).removeprefix(str(scope.get("root_path", ""))))
        if not reason:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": reason[:120]})
            return None
        content = {"error": {"message": reason, "type": "ServiceUnavailable", "code": 503}}
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})
        return None
