"""For how long engines are paused, as the client knows that pauses them, deep inside of whatever asks it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["PauseClock", "note_pause", "timing_pauses"]


@dataclass
class PauseClock:
    """Of one request to update engines."""

    seconds: float | None = None
    """Of the engine that was paused longest; None if none was paused that this request knows of."""


_clock: ContextVar[PauseClock | None] = ContextVar("checkpoint_engine_pause_clock", default=None)


@contextlib.contextmanager
def timing_pauses(clock: PauseClock) -> Generator[None]:
    """Whatever this thread pauses meanwhile is noted there."""
    before = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(before)


def note_pause(seconds: float) -> None:
    """An engine was paused for so long, and runs again."""
    clock = _clock.get()
    if clock is not None:
        clock.seconds = max(seconds, clock.seconds or 0.0)
