"""Asks a `vllm serve` through our own routes, see `checkpoint_engine_vllm.routes`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from checkpoint_engine.sdk import EngineRequestError, limits
from checkpoint_engine.sdk.client import (
    CollectiveRpcClient,
    Deadline,
    PauseMode,
    WorkerReport,
    WorkersOrder,
    WorkerStatus,
    shorten,
)

__all__ = ["RoutesClient"]

_PREFIX = "/v1/checkpoint_engine"
_NOT_FOUND, _UNAUTHORISED = 404, 401


@dataclass(frozen=True)
class _AdapterOrder(WorkersOrder):
    """All workers take a LoRA adapter."""

    name: str = ""
    directory: Path = Path()


class RoutesClient(CollectiveRpcClient):
    """See `checkpoint_engine.client.engine_client.EngineClient`."""

    def is_open(self, deadline: Deadline) -> bool:
        """Whether this server has our routes.

        Raises:
            EngineRequestError: it has them, and not for us.
            DeadlineError: it does not answer in time.
        """
        reply = self.endpoint.send("GET", _PREFIX, deadline)
        # A server whose key we lack says 401 of routes that it does not have, too.
        if reply.ok or reply.status in (_NOT_FOUND, _UNAUTHORISED):
            return reply.ok
        raise self._error("GET", _PREFIX, reply.status, reply.text)

    def wait_ready(self, deadline: Deadline) -> None:
        """Checks that its workers can be updated.

        Raises:
            DeadlineError: they do not answer in time.
            EngineRequestError: they cannot.
        """
        super().wait_ready(deadline)
        self.status(deadline)

    def world_size(self) -> int | None:
        """Number of workers, over all data-parallel replicas."""
        return self._status(Deadline(self.timeout)).get("world_size")

    def ask_workers(self, order: WorkersOrder, deadline: Deadline) -> list[WorkerReport]:
        """See `WorkersClient`."""
        patience = Deadline(deadline.remaining + limits.ANSWER)
        if isinstance(order, _AdapterOrder):
            self._ask("adapter", patience, name=order.name, directory=str(order.directory), version=order.version)
            return [WorkerReport(ok=True)]
        what = "verify" if order.compare else "update"
        answer = self._ask(
            what, patience, handles=dict(order.handles), version=order.version, timeout=deadline.remaining
        )
        return self._converted(answer.get("results"), list[WorkerReport])

    def load_adapter(
        self, name: str, directory: Path, *, version: str, pause: PauseMode, reset_caches: bool, timeout: float
    ) -> None:
        """See `AdapterClient`."""
        order = _AdapterOrder({}, version, pause, reset_caches, name=name, directory=directory.resolve())
        self.carry_out(order, timeout)

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """See `WorkersClient`."""
        return self._converted(self._status(deadline).get("workers"), list[WorkerStatus])

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """Running requests are kept, aborted or waited for."""
        self._ask("pause", deadline, mode=mode, clear_cache=reset_caches)

    def resume(self, deadline: Deadline) -> None:
        """Lets it run requests again."""
        self._ask("resume", deadline)

    def is_paused(self, deadline: Deadline) -> bool:
        """`GET /is_paused`, or where that is closed our own status, which asks the workers as well."""
        reply = self.endpoint.send("GET", "/is_paused", deadline)
        if reply.status == _NOT_FOUND:
            return bool(self._status(deadline).get("paused"))
        return reply.ok and '"is_paused":true' in reply.text.replace(" ", "")

    def reset_caches(self, deadline: Deadline) -> None:
        """Drops the prefix, multimodal and encoder caches.

        Raises:
            EngineRequestError: vLLM refuses, or the prefix cache is still in use.
            DeadlineError: it does not answer in time.
        """
        patience = Deadline(min(limits.KNOCK, deadline.remaining))
        while not self._ask("reset_caches", deadline).get("success"):
            if patience.expired:
                raise EngineRequestError(
                    f"{self.endpoint.address} cannot reset its prefix cache: requests still hold blocks of it. "
                    "Pause the engine for the update, or keep the caches if stale entries do no harm"
                )
            time.sleep(0.1)

    def publish_version(self, version: str, deadline: Deadline) -> None:
        """Where vLLM has a version of its weights (0.27 and newer)."""
        path = f"{_PREFIX}/weight_version"
        reply = self.endpoint.send("POST", path, deadline, body={"version": version})
        if not reply.ok and reply.status != _NOT_FOUND:
            raise self._error("POST", path, reply.status, reply.text)

    # -- inside

    def _ask(self, name: str, deadline: Deadline, /, **body: object) -> dict[str, Any]:
        return self._object(name, self.endpoint.call("POST", f"{_PREFIX}/{name}", deadline, body=body))

    def _status(self, deadline: Deadline) -> dict[str, Any]:
        return self._object("status", self.endpoint.call("GET", f"{_PREFIX}/status", deadline))

    def _object(self, name: str, answer: object) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise EngineRequestError(f"{self.endpoint.address} answered {_PREFIX}/{name} with {answer!r}")
        return cast("dict[str, Any]", answer)

    def _error(self, method: str, path: str, status: int, text: str) -> EngineRequestError:
        return EngineRequestError(f"{self.endpoint.address} answered {method} {path} with {status}: {shorten(text)}")
