"""Bodies of requests: whole before anybody looks at them, bounded in size and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from checkpoint_engine import limits
from checkpoint_engine.errors import DeadlineError, SettingError

__all__ = ["MOST_BYTES", "BoundedBodies"]

MOST_BYTES = 64 << 20
"""Metas of 140,000 tensors are some 30 MB."""
_MOST_BYTES_UNREAD = 64 << 10
"""Of a request whose method has no body."""


class _RefusedError(Exception):
    def __init__(self, status: int, kind: type[Exception], message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class BoundedBodies:
    """Turns away requests whose body is too long or too slow, before the application runs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its whole body, or answers 413 or 408."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = MOST_BYTES if scope["method"] in ("POST", "PUT", "PATCH") else _MOST_BYTES_UNREAD
        try:
            body = await _in_time(_read(Headers(scope=scope), receive, most))
        except _RefusedError as refused:
            # What is still to come of the body is nobody's: the connection ends with the answer.
            answer = JSONResponse(
                {"error": refused.kind.__name__, "message": str(refused)},
                status_code=refused.status,
                headers={"Connection": "close"},
            )
            await answer(scope, receive, send)
            return
        if body is None:
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


async def _in_time(reading: Coroutine[Any, Any, bytes | None]) -> bytes | None:
    try:
        return await asyncio.wait_for(reading, limits.HTTP_BODY)
    except asyncio.TimeoutError:
        raise _RefusedError(
            408, DeadlineError, f"the body of the request did not arrive within {limits.HTTP_BODY:g} s"
        ) from None


async def _read(headers: Headers, receive: Receive, most: int) -> bytes | None:
    """The body; None if the client is gone."""
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise _too_long(most)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_long(most)
        if not message.get("more_body", False):
            return bytes(body)


def _too_long(most: int) -> _RefusedError:
    return _RefusedError(413, SettingError, f"the body of the request is longer than {most} bytes; send less at once")
