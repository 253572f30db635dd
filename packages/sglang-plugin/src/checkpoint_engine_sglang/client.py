"""Asks a running SGLang to take an update."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.engine.client import CollectiveRpcClient, PauseMode
from checkpoint_engine.engine.endpoint import Endpoint, Reply, shorten
from checkpoint_engine.errors import DeadlineError, EngineRequestError
from checkpoint_engine_sglang import routes

logger = logging.getLogger(__name__)

_NOT_FOUND = 404
_POLL_SECONDS = 0.25
_KNOCK_SECONDS = 5.0
_ANSWER_SECONDS = 5.0
_NO_PLUGIN = (
    "it has no plugin of ours: install checkpoint-engine-sglang (and SGLang 0.5.11 or newer) in SGLang's environment; "
    "SGLANG_PLUGINS, if set there, must list checkpoint_engine. Its own path, `python -m "
    "sglang.srt.checkpoint_engine.update`, works without the plugin, but tells success from failure only on rank 0"
)


class SGLangClient(CollectiveRpcClient):
    """The client of a running SGLang; see `checkpoint_engine.engine.client.EngineClient`."""

    setup_hint = "is checkpoint-engine-sglang of the same version installed in SGLang's environment?"

    def __init__(self, endpoint: str, *, timeout: float = 60.0, api_key: str | None = None) -> None:
        """Remembers whom to ask; `api_key` is SGLang's administrator's key, or its only one, or as in `Endpoint`."""
        super().__init__(endpoint, timeout=timeout)
        if api_key is not None:
            self.endpoint = Endpoint(endpoint, api_key=api_key)
        self._pause_mode: PauseMode = "none"
        self._flush = True
        self._verify = False

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until SGLang can be asked to update; it need not serve yet, as before its first weights it does not.

        Raises:
            DeadlineError: it does not come up in time.
            EngineRequestError: it has no plugin of ours.
        """
        seen = "nothing was tried"
        while not deadline.expired:
            try:
                reply = self.endpoint.send("GET", routes.STATUS, Deadline(min(_KNOCK_SECONDS, deadline.remaining)))
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
        raise DeadlineError(f"{self.endpoint.address} was not ready within {deadline.seconds:g} s: {seen}")

    def world_size(self) -> int | None:
        """Number of workers, over tensor-parallel ranks, stages and replicas; None if it cannot tell now."""
        return len(self._workers(Deadline(self.timeout))) or None

    def collective_rpc(self, method: str, deadline: Deadline, args: Sequence[object] = ()) -> list[Any]:
        """Asks the plugin for what `checkpoint_engine_update` and `checkpoint_engine_status` return on every worker.

        Raises:
            EngineRequestError: there is no plugin, or it answers with an error.
            DeadlineError: it does not answer in time.
        """
        if method == "checkpoint_engine_status":
            return self._workers(deadline)
        if method != "checkpoint_engine_update":
            raise EngineRequestError(f"SGLang has no way to run {method!r} on its workers")
        handles, version, timeout = cast("tuple[Mapping[str, str], str, float]", tuple(args))
        body = {
            "handles": [list(pair) for pair in handles.items()],
            "version": version,
            "timeout": timeout,
            "wait_for_requests": self._pause_mode == "wait",
            "flush_cache": self._flush and not self._verify,
            "verify": self._verify,
        }
        reply = self.endpoint.send("POST", routes.UPDATE, Deadline(deadline.remaining + _ANSWER_SECONDS), body=body)
        results = self._list_in(reply, "POST", routes.UPDATE, "results")
        if not results and not reply.ok:
            raise EngineRequestError(
                f"{self.endpoint.address} answered POST {routes.UPDATE} with {reply.status}: {shorten(reply.text)}"
            )
        return results

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """Has every worker compare its weights with the checkpoint that `handles` offer; see `CollectiveRpcClient`."""
        self._verify = True
        try:
            super().verify_weights(handles, version=version, timeout=timeout)
        finally:
            self._verify = False

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
        self._pause_mode, self._flush = pause, reset_caches
        super().update_weights(
            # The update itself waits for running requests, without a pause before it.
            handles,
            version=version,
            pause="none" if pause == "wait" else pause,
            reset_caches=False,  # the workers flush within the update, before any request runs
            timeout=timeout,
        )

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """`POST /pause_generation`.

        Raises:
            EngineRequestError: SGLang refuses.
            DeadlineError: it did not pause in time.
        """
        del reset_caches
        kept = "retract" if self._flush else "in_place"
        words = {"keep": kept, "abort": "abort"}
        self.endpoint.call("POST", "/pause_generation", deadline, body={"mode": words[mode]})

    def resume(self, deadline: Deadline) -> None:
        """`POST /continue_generation`."""
        self.endpoint.call("POST", "/continue_generation", deadline, body={"torch_empty_cache": False})

    # -- inside

    def _workers(self, deadline: Deadline) -> list[Any]:
        reply = self.endpoint.send("GET", routes.STATUS, deadline)
        if reply.status == _NOT_FOUND:
            raise EngineRequestError(f"{self.endpoint.address} cannot be updated safely: {_NO_PLUGIN}")
        return self._list_in(reply, "GET", routes.STATUS, "workers")

    def _stages(self, timeout: float) -> int:
        content: object = self.endpoint.call("GET", routes.STATUS, Deadline(timeout))
        return int(cast("dict[str, Any]", content).get("pipeline_stages", 1)) if isinstance(content, dict) else 1

    def _list_in(self, reply: Reply, method: str, path: str, key: str) -> list[Any]:
        """A list in the JSON of a reply; a failed update has one as well, with the failure of each worker."""
        try:
            content: object = msgspec.json.decode(reply.text)
        except msgspec.MsgspecError:
            content = None
        found = cast("dict[str, object]", content).get(key) if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise EngineRequestError(
                f"{self.endpoint.address} answered {method} {path} with {reply.status}: {shorten(reply.text)}"
            )
        return cast("list[Any]", found)
