"""Answers that come line by line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx


def lines_of(reply: httpx.Response) -> Iterator[bytes]:
    """Lines as JSON has them: httpx also breaks at characters, such as U+0085, that a text may hold."""
    rest = b""
    for piece in reply.iter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


class TokenStream:
    """A generation that arrives piece by piece in a thread."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self._url, self._body = url, body
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def take(self, answer: dict[str, Any]) -> None:
        """Adds to `tokens` what a piece brought."""
        raise NotImplementedError

    def wait_for(self, tokens: int) -> None:
        end = time.monotonic() + 60
        while len(self.tokens) < tokens:
            assert time.monotonic() < end, f"{len(self.tokens)} tokens came; {self.error}"
            time.sleep(0.02)

    def join(self) -> None:
        self._thread.join(timeout=180)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=180) as reply:
                for line in lines_of(reply):
                    if line.startswith(b"data: {"):
                        self.take(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.error = error
