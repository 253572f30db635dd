"""Answers that come line by line."""

from __future__ import annotations

from collections.abc import Iterator

import httpx


def lines_of(reply: httpx.Response) -> Iterator[bytes]:
    """Lines as JSON has them: httpx also breaks at characters, such as U+0085, that a text may hold."""
    rest = b""
    for piece in reply.iter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest
