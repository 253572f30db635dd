"""Asks a running SGLang to take an update."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from checkpoint_engine.sdk import Deadline, DeadlineError, EngineRequestError, limits
from checkpoint_engine.sdk.client import (
    Endpoint,
    PauseMode,
    Reply,
    WorkerReport,
    WorkersClient,
    WorkersOrder,
    WorkerStatus,
    shorten,
)
from checkpoint_engine_sglang import routes

__all__ = ["SGLangClient"]

_Words = TypeVar("_Words", list[WorkerReport], list[WorkerStatus])

logger = logging.getLogger(__name__)

_NOT_FOUND = 404
_POLL_SECONDS = 0.25
_NO_PLUGIN = (
    "it has no plugin of ours: install checkpoint-engine-sglang (and SGLang 0.5.11 or newer) in SGLang's environment; "
    "SGLANG_PLUGINS, if set there, must list checkpoint_engine. Its own path, `python -m "
    "sglang.srt.checkpoint_engine.update`, works without the plugin, but tells success from failure only on rank 0"
)


class SGLangClient(WorkersClient):
    """The client of a running SGLang; see `checkpoint_engine.client.engine_client.EngineClient`."""

    setup_hint = "is checkpoint-engine-sglang of the same version installed in SGLang's environment?"

    def __init__(self, endpoint: str, *, timeout: float = 60.0, api_key: str | None = None) -> None:
        """Remembers whom to ask; `api_key` is SGLang's administrator's key, or its only one, or as in `Endpoint`."""
        super().__init__(endpoint, timeout=timeout)
        if api_key is not None:
            self.endpoint = Endpoint(endpoint, api_key=api_key)

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until SGLang can be asked to update; it need not serve yet, as before its first weights it does not.

        Raises:
            DeadlineError: it does not come up in time.
            EngineRequestError: it has no plugin of ours.
        """
        seen = "nothing was tried"
        while not deadline.expired:
            try:
                reply = self.endpoint.send("GET", routes.STATUS, Deadline(min(limits.KNOCK, deadline.remaining)))
            except (EngineRequestError, DeadlineError) as error:
                seen = str(error)
            else:
                if reply.ok:
                    return
                seen = f"GET {routes.STATUS} was answered with {reply.status}: {shorten(reply.text)}"
                if reply.status == _NOT_FOUND:
                    raise EngineRequestError(f"{self.endpoint.address} cannot be updated safely: {_NO_PLUGIN}")
                if reply.status in range(400, 500):
                    raise EngineRequestError(f"{self.endpoint.address} is not an SGLang that can be updated: {seen}")
            time.sleep(min(_POLL_SECONDS, deadline.remaining))
        raise DeadlineError(f"{self.endpoint.address} was not ready within {deadline.said}: {seen}")

    def world_size(self) -> int | None:
        """Number of workers, over tensor-parallel ranks, stages and replicas; None if it cannot tell now."""
        return len(self.status(Deadline(self.timeout))) or None

    def ask_workers(self, order: WorkersOrder, deadline: Deadline) -> list[WorkerReport]:
        """Asks the plugin's own route; see `WorkersClient`.

        The workers wait for running requests and flush the cache within the update, before any request runs.
        """
        body = {
            "handles": [list(pair) for pair in order.handles.items()],
            "version": order.version,
            "timeout": deadline.remaining,
            "wait_for_requests": order.pause == "wait",
            "flush_cache": order.reset_caches,
        }
        route = routes.VERIFY if order.compare else routes.UPDATE
        reply = self.endpoint.send("POST", route, Deadline(deadline.remaining + limits.ANSWER), body=body)
        return self._list_in(reply, "results", list[WorkerReport], f"POST {route}")

    def abort(self, deadline: Deadline) -> bool:
        """Has the workers give up what is under way, if anything is; returns whether something was."""
        content: object = self.endpoint.call("POST", routes.ABORT, deadline)
        return isinstance(content, dict) and cast("dict[str, Any]", content).get("aborted") is True

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """What every worker holds now; see `WorkersClient`."""
        reply = self.endpoint.send("GET", routes.STATUS, deadline)
        if reply.status == _NOT_FOUND:
            raise EngineRequestError(f"{self.endpoint.address} cannot be updated safely: {_NO_PLUGIN}")
        return self._list_in(reply, "workers", list[WorkerStatus], f"GET {routes.STATUS}")

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """Pauses, updates all workers, flushes the cache, publishes the version, resumes; see `EngineClient`.

        `keep` retracts running requests: they are computed anew, prompt and tokens so far, with the new weights.
        Without `reset_caches` they keep their cache and go on where they stand. `wait` lets them finish first.

        Raises:
            EngineRequestError: SGLang refuses, or a worker failed; the message names the worker.
            DeadlineError: it does not answer in time.
        """
        if pause == "keep" and self._stages(timeout) > 1:
            logger.warning(
                "%s has pipeline stages, which SGLang cannot stop between two steps: running requests are waited for",
                self.endpoint.address,
            )
            pause = "wait"
        super().update_weights(handles, version=version, pause=pause, reset_caches=reset_caches, timeout=timeout)

    def load_adapter(
        self, name: str, directory: Path, *, version: str, pause: PauseMode, reset_caches: bool, timeout: float
    ) -> None:
        """See `AdapterClient`; requests that run go on with the adapter that they began with, and its cached keys.

        So SGLang is not paused and no cache dropped: `pause` and `reset_caches` say nothing here.
        """
        del pause, reset_caches
        body = {"name": name, "directory": str(directory.resolve()), "version": version}
        reply = self.endpoint.send("POST", routes.ADAPTER, Deadline(timeout), body=body)
        if not reply.ok:
            hint = f": {_NO_PLUGIN}" if reply.status == _NOT_FOUND else f" with {reply.status}: {shorten(reply.text)}"
            raise EngineRequestError(f"{self.endpoint.address} refuses the adapter {name!r}{hint}")

    def needs_pause(self, mode: PauseMode) -> bool:
        """See `WorkersClient`: the update itself waits for running requests, without a pause before it."""
        return mode in ("keep", "abort")

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """`POST /pause_generation`.

        Raises:
            EngineRequestError: SGLang refuses.
            DeadlineError: it did not pause in time.
        """
        kept = "retract" if reset_caches else "in_place"
        words = {"keep": kept, "abort": "abort"}
        self.endpoint.call("POST", "/pause_generation", deadline, body={"mode": words[mode]})

    def resume(self, deadline: Deadline) -> None:
        """`POST /continue_generation`."""
        self.endpoint.call("POST", "/continue_generation", deadline, body={"torch_empty_cache": False})

    def is_paused(self, deadline: Deadline) -> bool:
        """As the plugin's status has it; False where its plugin is older than that."""
        content: object = self.endpoint.call("GET", routes.STATUS, deadline)
        return isinstance(content, dict) and cast("dict[str, Any]", content).get("paused") is True

    def reset_caches(self, deadline: Deadline) -> None:
        """Nothing is left to do: the workers did so within the update."""

    # -- inside

    def _stages(self, timeout: float) -> int:
        content: object = self.endpoint.call("GET", routes.STATUS, Deadline(timeout))
        return int(cast("dict[str, Any]", content).get("pipeline_stages", 1)) if isinstance(content, dict) else 1

    def _list_in(self, reply: Reply, key: str, kind: type[_Words], request: str) -> _Words:
        """What the workers say in a reply; a failed update has a list as well, with the failure of each worker."""
        try:
            content = msgspec.json.decode(reply.text, type=dict[str, object])
        except msgspec.MsgspecError:
            content = {}
        found = content.get(key)
        if not isinstance(found, list) or (not found and not reply.ok):
            hint = "" if "error" in content else f" ({self.setup_hint})"  # the plugin says itself what is wrong
            raise EngineRequestError(
                f"{self.endpoint.address} answered {request} with {reply.status}: {shorten(reply.text)}{hint}"
            )
        return self._converted(cast("list[object]", found), kind)
