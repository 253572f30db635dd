"""Finds out which engine answers at an endpoint, and speaks to it through its own client."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.client.announced import EngineSign
from checkpoint_engine.client.delegate import ClientDelegate
from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.client.engine_client import EngineClient
from checkpoint_engine.client.plugins import engine_signs, plugin_client
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError

__all__ = ["AutoClient", "identify", "load_client"]

_POLL_SECONDS = 0.25
_KEY = 401
"""Status of what asks for a key."""


@dataclass(frozen=True)
class _Found:
    """What one look showed."""

    seen: str = ""
    engine: str = ""
    """Empty: none."""
    may_start: bool = False
    """Whether there may yet be one."""


class AutoClient(ClientDelegate):
    """The client of whichever engine answers."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None:
        super().__init__(endpoint, timeout=timeout)
        self._client: EngineClient | None = None

    def chosen(self, deadline: Deadline) -> EngineClient:
        """That of its plugin; an engine that is not there is said at once."""
        return self._choose(deadline, wait=False)

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until an engine answers, and then until it serves; raises as `identify` and `EngineClient`."""
        self._choose(deadline, wait=True).wait_ready(deadline)

    def _choose(self, deadline: Deadline, *, wait: bool) -> EngineClient:
        if self._client is None:
            client = plugin_client(identify(self.endpoint, deadline, wait=wait))
            self._client = client(self.endpoint.address, timeout=self.timeout)
        return self._client


def load_client(engine: str) -> type[EngineClient]:
    """The client class of an engine, by its name; that of `auto` finds out which engine answers.

    Raises:
        MissingDependencyError: no installed plugin offers that engine, or the plugin cannot be imported.
    """
    return AutoClient if engine == "auto" else plugin_client(engine)


def identify(endpoint: Endpoint, deadline: Deadline, *, wait: bool = False) -> str:
    """The name of the engine that answers there; with `wait`, one that is still starting is waited for.

    Raises:
        DeadlineError: nothing answers in time.
        EngineRequestError: nobody listens there, or what answers is none of the engines that have a plugin here.
    """
    signs = engine_signs()
    while True:
        found = _look(endpoint, signs, deadline)
        if found.engine:
            return found.engine
        if not found.may_start:
            raise EngineRequestError(
                f"what answers at {endpoint.address} is none of {', '.join(signs)} ({found.seen}); "
                "install the engine's plugin here, or name the engine with --engine"
            )
        if not wait:
            raise EngineRequestError(f"no engine answers at {endpoint.address}: {found.seen}")
        time.sleep(min(_POLL_SECONDS, deadline.remaining))
        if deadline.expired:
            raise DeadlineError(f"no engine answered at {endpoint.address} within {deadline.said}: {found.seen}")


def _look(endpoint: Endpoint, signs: Mapping[str, EngineSign], deadline: Deadline) -> _Found:
    """Asks once."""
    statuses: list[str] = []
    try:
        for engine, sign in signs.items():
            reply = endpoint.send("GET", sign.path, Deadline(min(limits.KNOCK, deadline.remaining)))
            if reply.ok and _has(reply.text, sign.key):
                return _Found(engine=engine)
            statuses.append(f"GET {sign.path}: {reply.status}" + (f", {reply.text}" if reply.status == _KEY else ""))
    except (EngineRequestError, DeadlineError) as error:
        return _Found(str(error), may_start=True)
    return _Found(", ".join(statuses), may_start=any(": 5" in status for status in statuses))


def _has(text: str, key: str) -> bool:
    try:
        content: object = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return False
    return isinstance(content, dict) and key in cast("dict[str, object]", content)
