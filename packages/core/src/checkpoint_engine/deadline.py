"""A point in time by which something must have happened."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, SettingError

__all__ = ["Cancel", "Deadline"]


_LONGEST = 1e9
"""Seconds: thirty years. Operating systems take no more."""


class Deadline:
    """Counts down from a number of seconds on the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        if not seconds < _LONGEST:
            raise SettingError(f"{seconds:g} s is no time to wait; give a number of seconds below {_LONGEST:g}")
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the time is over."""
        return self.remaining == 0.0

    @property
    def said(self) -> str:
        """How long it was, for people: what is left of another deadline when this one begins is no round number."""
        return f"{round(self.seconds, 1) if self.seconds >= 1 else self.seconds:.6g} s"

    def milliseconds(self, at_most: float = math.inf) -> int:
        """What is left, in whole milliseconds, for `poll`-like calls."""
        return math.ceil(min(self.remaining * 1000, at_most))

    def check(self, waiting_for: str) -> None:
        """Raises `DeadlineError` once the time is over.

        Raises:
            DeadlineError: the time is over.
        """
        if self.expired:
            raise DeadlineError(f"{waiting_for} did not happen within {self.said}")


class Cancel:
    """A switch by which one thread tells others to stop waiting; the first cause wins."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._cause: CheckpointEngineError | None = None
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def set(self, cause: CheckpointEngineError) -> None:
        """Asks everybody to stop, because of `cause`."""
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            callbacks, self._callbacks = self._callbacks, []
        self._event.set()
        for callback in callbacks:
            callback()

    def on_set(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once when the switch is thrown, at once if it already is."""
        with self._lock:
            if self._cause is None:
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, seconds: float) -> bool:
        """Waits until the switch is thrown or the time is over; returns whether it is thrown."""
        return self._event.wait(seconds)

    @property
    def cause(self) -> CheckpointEngineError | None:
        """Why, or None while nobody asked."""
        return self._cause

    def check(self) -> None:
        """Raises the cause, if there is one."""
        if self._cause is not None:
            raise self._cause
