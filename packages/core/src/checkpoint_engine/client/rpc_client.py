"""Clients of engines that run a method on all their workers by `POST /collective_rpc`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.client.endpoint import shorten
from checkpoint_engine.client.engine_client import PauseMode
from checkpoint_engine.client.workers_client import WorkersClient, WorkersOrder
from checkpoint_engine.contract.reports import WorkerReport, WorkerStatus
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError

__all__ = ["CollectiveRpcClient", "ReferenceClient"]

_POLL_SECONDS = 0.25


class CollectiveRpcClient(WorkersClient):
    """A client for engines that run a method on all their workers by `POST /collective_rpc`, as vLLM does."""

    def wait_ready(self, deadline: Deadline) -> None:
        """Polls `GET /health` until it succeeds; see `EngineClient`."""
        seen = "nothing was tried"
        while not deadline.expired:
            try:
                reply = self.endpoint.send("GET", "/health", Deadline(min(limits.KNOCK, deadline.remaining)))
            except (EngineRequestError, DeadlineError) as error:
                seen = str(error)
            else:
                if reply.ok:
                    return
                seen = f"GET /health was answered with {reply.status}: {shorten(reply.text)}"
                if reply.status in range(400, 500):
                    raise EngineRequestError(f"{self.endpoint.address} is not an engine that can be updated: {seen}")
            time.sleep(min(_POLL_SECONDS, deadline.remaining))
        raise DeadlineError(f"{self.endpoint.address} was not ready within {deadline.said}: {seen}")

    def world_size(self) -> int | None:
        """Asks `GET /get_world_size`; see `EngineClient`."""
        reply = self.endpoint.send("GET", "/get_world_size", Deadline(self.timeout))
        if not reply.ok:
            return None
        try:
            return msgspec.json.decode(reply.text, type=dict[str, int]).get("world_size")
        except msgspec.MsgspecError:
            return None

    def collective_rpc(self, method: str, deadline: Deadline, args: Sequence[object] = ()) -> list[Any]:
        """Runs a method on every worker and returns their results in order of rank.

        Raises:
            EngineRequestError: the engine answers with an error.
            DeadlineError: it does not answer in time.
        """
        body: dict[str, object] = {
            "method": method,
            "args": list(args),
            "kwargs": {},
            "timeout": deadline.remaining,
        }
        answer = self.endpoint.call("POST", "/collective_rpc", Deadline(deadline.remaining + limits.ANSWER), body=body)
        if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):  # pyright: ignore[reportUnknownMemberType]
            raise EngineRequestError(f"{self.endpoint.address} returned no results of {method!r}: {answer!r}")
        return cast("list[Any]", answer["results"])

    def ask_workers(self, order: WorkersOrder, deadline: Deadline) -> list[WorkerReport]:
        """Runs `checkpoint_engine_update`; see `WorkersClient`."""
        args = (dict(order.handles), order.version, deadline.remaining)
        try:
            results = self.collective_rpc("checkpoint_engine_update", deadline, args)
        except EngineRequestError as error:
            raise EngineRequestError(f"{error}{self.setup_hint and f' ({self.setup_hint})'}") from error
        return self._converted(results, list[WorkerReport])

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """Runs `checkpoint_engine_status`; see `WorkersClient`."""
        return self._converted(self.collective_rpc("checkpoint_engine_status", deadline), list[WorkerStatus])


class ReferenceClient(CollectiveRpcClient):
    """The client of `checkpoint_engine.reference.server`."""

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:  # noqa: ARG002
        """`POST /pause`."""
        self.endpoint.call("POST", "/pause", deadline, query={"mode": mode})

    def resume(self, deadline: Deadline) -> None:
        """`POST /resume`."""
        self.endpoint.call("POST", "/resume", deadline)

    def is_paused(self, deadline: Deadline) -> bool:
        """`GET /is_paused`."""
        return bool(self.endpoint.call("GET", "/is_paused", deadline)["is_paused"])

    def reset_caches(self, deadline: Deadline) -> None:
        """`POST /reset_prefix_cache`."""
        self.endpoint.call("POST", "/reset_prefix_cache", deadline)
