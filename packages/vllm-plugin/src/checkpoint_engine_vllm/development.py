"""Asks a `vllm serve` through the routes that VLLM_SERVER_DEV_MODE=1 opens, and our worker methods."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, cast

from checkpoint_engine.sdk import CheckpointEngineError, EngineRequestError, limits
from checkpoint_engine.sdk.client import CollectiveRpcClient, Deadline, PauseMode, Reply, in_background, shorten

__all__ = ["NO_EXTENSION", "DevelopmentClient"]

logger = logging.getLogger(__name__)

_NOT_FOUND = 404
_VERSION = re.compile(r'"version":\s*"(\d+)\.(\d+)\.')
_MODES_SINCE = (0, 22)
"""The vLLM whose pause is known to take modes; some before it do too."""
_NO_DEV_MODE = (
    "no way in is open: start `vllm serve` with VLLM_PLUGINS=checkpoint_engine in its environment (0.26 and newer; if "
    "it has an --api-key, CHECKPOINT_ENGINE_API_KEY must say it here), or with VLLM_SERVER_DEV_MODE=1"
)
_NO_PAUSE = f"{_NO_DEV_MODE}; before 0.12, vLLM cannot be paused: use pause mode none, when it serves no requests"
NO_EXTENSION: Final = (
    "its workers lack our methods: install checkpoint-engine-vllm in vLLM's environment, or name the class with "
    "--worker-extension-cls checkpoint_engine_vllm.WorkerExtension (VLLM_PLUGINS, if set, must list checkpoint_engine)"
)
"""How long a prefix cache whose blocks are still held is asked again."""
_CACHES = (
    ("/reset_prefix_cache", {"reset_running_requests": "true"}),
    ("/reset_mm_cache", None),
    ("/reset_encoder_cache", None),
)


class DevelopmentClient(CollectiveRpcClient):
    """See `checkpoint_engine.client.engine_client.EngineClient`."""

    setup_hint = "is checkpoint-engine-vllm of the same version installed in vLLM's environment?"

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None:
        super().__init__(endpoint, timeout=timeout)
        self._pause_parameters: dict[str, set[str]] = {}
        """By vLLM's version."""

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until vLLM serves, and checks that its workers can be updated.

        Raises:
            DeadlineError: it does not come up in time.
            EngineRequestError: it cannot be updated; the message says how to start it.
        """
        super().wait_ready(deadline)
        self.status(deadline)

    def collective_rpc(self, method: str, deadline: Deadline, args: Sequence[object] = ()) -> list[Any]:
        """Runs a method on every worker and returns their results in order of rank.

        Raises:
            EngineRequestError: vLLM answers with an error; where its set-up is to blame, the message says so.
            DeadlineError: it does not answer in time.
        """
        try:
            return super().collective_rpc(method, deadline, args)
        except EngineRequestError as error:
            hint = self._missing_set_up(deadline)
            if not hint:
                raise
            raise EngineRequestError(f"{error}; {hint}") from error

    def pause(self, mode: PauseMode, *, reset_caches: bool, deadline: Deadline) -> None:
        """`POST /pause`; running requests are kept, aborted or waited for.

        Raises:
            EngineRequestError: vLLM refuses, or is too old for this mode.
            DeadlineError: it did not pause in time; mode `wait` takes as long as the longest request.
        """
        query = {"mode": mode, "clear_cache": str(reset_caches).lower()}
        known = self._parameters_of_pause(deadline)
        if known and "mode" not in known:
            if mode == "keep":
                raise EngineRequestError(
                    f"{self.endpoint.address} runs a vLLM that cannot keep running requests across a pause; use pause "
                    "mode abort or wait"
                )
            query = {"wait_for_inflight_requests": str(mode == "wait").lower(), **query}
        reply = self.endpoint.send("POST", "/pause", deadline, query=query)
        if not reply.ok:
            raise self._refused("/pause", reply, _NO_PAUSE if reply.status == _NOT_FOUND else "")

    def resume(self, deadline: Deadline) -> None:
        """`POST /resume`."""
        self.endpoint.call("POST", "/resume", deadline)

    def is_paused(self, deadline: Deadline) -> bool:
        """`GET /is_paused`; False where vLLM has no such route."""
        reply = self.endpoint.send("GET", "/is_paused", deadline)
        return reply.ok and '"is_paused":true' in reply.text.replace(" ", "")

    def reset_caches(self, deadline: Deadline) -> None:
        """Drops the prefix, multimodal and encoder caches; one that this vLLM does not have is passed over.

        Raises:
            EngineRequestError: vLLM refuses, or the prefix cache is still in use.
            DeadlineError: it does not answer in time.
        """
        resets = [
            in_background(partial(self._reset_once_free, path, query, deadline), "checkpoint-engine-caches")
            for path, query in _CACHES
        ]
        for reset in resets:
            reset.result()

    def publish_version(self, version: str, deadline: Deadline) -> None:
        """`POST /update_weight_version`, where vLLM has it (0.32 and newer)."""
        reply = self.endpoint.send("POST", "/update_weight_version", deadline, body={"new_version": version})
        if not reply.ok and reply.status != _NOT_FOUND:
            raise self._refused("/update_weight_version", reply)

    # -- inside

    def _reset_once_free(self, path: str, query: dict[str, str] | None, deadline: Deadline) -> None:
        patience = Deadline(min(limits.KNOCK, deadline.remaining))
        while not self._reset(path, query, deadline):
            if patience.expired:
                raise EngineRequestError(
                    f"{self.endpoint.address} cannot reset its prefix cache: requests still hold blocks of it. "
                    "Pause the engine for the update, or keep the caches if stale entries do no harm"
                )
            time.sleep(0.1)

    def _reset(self, path: str, query: dict[str, str] | None, deadline: Deadline) -> bool:
        reply = self.endpoint.send("POST", path, deadline, query=query)
        if reply.status == _NOT_FOUND:
            logger.warning("%s has no %s; that cache was not reset", self.endpoint.address, path)
        elif not reply.ok:
            raise self._refused(path, reply)
        return '"success":false' not in reply.text.replace(" ", "")

    def _refused(self, path: str, reply: Reply, hint: str = "") -> EngineRequestError:
        text = f"{self.endpoint.address} answered POST {path} with {reply.status}: {shorten(reply.text)}"
        return EngineRequestError(f"{text}; {hint}" if hint else text)

    def _missing_set_up(self, deadline: Deadline) -> str:
        """Why no worker method can be called, if it is vLLM's set-up; asked only after a failure."""
        try:
            # Any method that every worker has tells whether the route or only our methods are missing.
            patience = Deadline(min(limits.KNOCK, deadline.remaining))
            reply = self.endpoint.send("POST", "/collective_rpc", patience, body={"method": "check_health"})
            if not reply.ok:
                return _NO_DEV_MODE if reply.status == _NOT_FOUND else ""
        except CheckpointEngineError:
            return ""
        try:
            super().collective_rpc("checkpoint_engine_status", Deadline(min(limits.KNOCK, deadline.remaining)))
        except CheckpointEngineError:
            return NO_EXTENSION
        return ""

    def _parameters_of_pause(self, deadline: Deadline) -> set[str]:
        """By its version, or where that is an old one as vLLM's own description has them, which takes a second or more.

        Empty where it has none.
        """
        version = self.endpoint.send("GET", "/version", deadline)
        numbers = _VERSION.search(version.text) if version.ok else None
        if numbers and tuple(map(int, numbers.groups())) >= _MODES_SINCE:
            return {"mode", "clear_cache"}
        known = self._pause_parameters.get(version.text) if version.ok else None
        if not known:
            known = self._query_parameters("/pause")
            self._pause_parameters[version.text] = known
        return known

    def _query_parameters(self, path: str) -> set[str]:
        """Of a `POST` route, as vLLM's own description has them; empty where it has none."""
        try:
            described = cast("dict[str, Any]", self.endpoint.call("GET", "/openapi.json", Deadline(self.timeout)))
            parameters = described["paths"][path]["post"]["parameters"]
            return {parameter["name"] for parameter in parameters}
        except (CheckpointEngineError, KeyError, TypeError):
            return set()
