"""The tests' own reading of streamed answers."""

from __future__ import annotations

import httpx
import pytest

from tests.core.streams import lines_of

pytestmark = pytest.mark.pure


def test_only_line_feeds_end_a_line() -> None:
    pieces = ["data: a\u0085b", "\u2028c\nda", "ta: d\n\nend"]
    reply = httpx.Response(200, content=(piece.encode() for piece in pieces))
    assert [line.decode() for line in lines_of(reply)] == ["data: a\u0085b\u2028c", "data: d", "", "end"]
