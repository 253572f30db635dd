"""Connections to the HTTP API: bounded in number, and none may say nothing for long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from uvicorn.protocols.http.h11_impl import H11Protocol

from checkpoint_engine import limits

__all__ = ["MOST_CONNECTIONS", "BoundedProtocol"]

MOST_CONNECTIONS = 128
"""When one more comes, the one that has had nothing under way for longest makes room for it."""


class BoundedProtocol(H11Protocol):
    """uvicorn's, with a deadline for each request's headers and a place for whoever comes next.

    uvicorn itself waits for ever for the headers of a connection's first request, and of a further one that has begun.
    """

    _since = 0.0
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        cycle = self.cycle
        return not self.transport.is_closing() and (cycle is None or cycle.response_complete)  # pyright: ignore[reportUnnecessaryComparison] - None until the first request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts it, and makes room."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._give_time()
        others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
        if sum(not other.transport.is_closing() for other in others) >= MOST_CONNECTIONS:
            _end_longest_waiting(others)

    def data_received(self, data: bytes) -> None:
        """Takes bytes; what is not a whole request yet has to become one in time."""
        super().data_received(data)
        if not self.is_waiting:
            self._stop_timer()
        elif self._timer is None:
            self._give_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """It is idle from now on."""
        self._since = self.loop.time()
        super().on_response_complete()

    def _give_time(self) -> None:
        self._timer = self.loop.call_later(limits.HTTP_HEADERS, self._end_if_waiting)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_if_waiting(self) -> None:
        self._timer = None
        if self.is_waiting:
            self.transport.abort()

    @property
    def waiting_since(self) -> float:
        """When it last had something to do, by the loop's clock."""
        return self._since


def _end_longest_waiting(connections: Iterable[BoundedProtocol]) -> None:
    waiting = [connection for connection in connections if connection.is_waiting]
    if waiting:  # else uvicorn answers 503 to the newcomer
        min(waiting, key=lambda connection: connection.waiting_since).transport.abort()
