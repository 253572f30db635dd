"""Finds out which engine answers at an endpoint, and speaks to it through its own client."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

import msgspec

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.engine.client import EngineClient, PauseMode
from checkpoint_engine.engine.endpoint import Endpoint
from checkpoint_engine.engine.plugins import plugin_client, verifying_client
from checkpoint_engine.errors import DeadlineError, EngineRequestError

_SIGNS = (("sglang", "/model_info", "model_path"), ("vllm", "/version", "version"), ("reference", "/pids", "pids"))
"""Name of an engine, a path that only it answers, and what stands in that answer."""

_KNOCK_SECONDS = 5.0
_POLL_SECONDS = 0.25
_KEY = 401
"""Status of what asks for a key."""


class AutoClient:
    """The client of whichever engine answers; see `checkpoint_engine.engine.client.EngineClient`."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None:
        self._endpoint = Endpoint(endpoint)
        self._timeout = timeout
        self._client: EngineClient | None = None

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until an engine answers, and then until it serves.

        Raises:
            DeadlineError: nothing answers in time; the message says what was seen last.
            EngineRequestError: what answers is no engine that is known, or cannot be updated.
            MissingDependencyError: its plugin is not installed here.
        """
        self._find(deadline).wait_ready(deadline)

    def world_size(self) -> int | None:
        """Number of the engine's workers; None if it cannot tell."""
        return self._find(Deadline(self._timeout)).world_size()

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """See `EngineClient.update_weights`."""
        deadline = Deadline(timeout)
        client = self._find(deadline)
        client.update_weights(
            handles, version=version, pause=pause, reset_caches=reset_caches, timeout=deadline.remaining
        )

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """See `CollectiveRpcClient.verify_weights`.

        Raises:
            MissingDependencyError: the plugin of the engine that answers cannot do this.
        """
        deadline = Deadline(timeout)
        verifying_client(self._find(deadline)).verify_weights(handles, version=version, timeout=deadline.remaining)

    def _find(self, deadline: Deadline) -> EngineClient:
        if self._client is None:
            client = plugin_client(identify(self._endpoint, deadline))
            self._client = client(self._endpoint.address, timeout=self._timeout)
        return self._client


def load_client(engine: str) -> type[EngineClient]:
    """The client class of an engine, by its name; that of `auto` finds out which engine answers.

    Raises:
        MissingDependencyError: no installed plugin offers that engine, or the plugin cannot be imported.
    """
    return AutoClient if engine == "auto" else plugin_client(engine)


def identify(endpoint: Endpoint, deadline: Deadline) -> str:
    """The name of the engine that answers there, which is waited for.

    Raises:
        DeadlineError: nothing answers in time.
        EngineRequestError: something answers, but none of the engines that are known.
    """
    seen = "nothing was tried"
    while not deadline.expired:
        try:
            statuses: list[str] = []
            for engine, path, key in _SIGNS:
                reply = endpoint.send("GET", path, Deadline(min(_KNOCK_SECONDS, deadline.remaining)))
                if reply.ok and _has(reply.text, key):
                    return engine
                statuses.append(f"GET {path}: {reply.status}" + (f", {reply.text}" if reply.status == _KEY else ""))
        except (EngineRequestError, DeadlineError) as error:
            seen = str(error)
        else:
            seen = ", ".join(statuses)
            if not any(": 5" in status for status in statuses):
                raise EngineRequestError(
                    f"what answers at {endpoint.address} is none of {', '.join(engine for engine, _, _ in _SIGNS)} "
                    f"({seen}); name the engine with --engine"
                )
        time.sleep(min(_POLL_SECONDS, deadline.remaining))
    raise DeadlineError(f"no engine answered at {endpoint.address} within {deadline.seconds:g} s: {seen}")


def _has(text: str, key: str) -> bool:
    try:
        content: object = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return False
    return isinstance(content, dict) and key in cast("dict[str, object]", content)
