"""Waiting for what others bring about."""

from __future__ import annotations

import time
from collections.abc import Callable

from checkpoint_engine.deadline import Deadline


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether it comes true in that time."""
    deadline = Deadline(seconds)
    while not (done := condition()) and not deadline.expired:
        time.sleep(0.01)
    return done
