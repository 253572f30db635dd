"""Looks at files that others read out of this process's memory, and says so when one is written to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from checkpoint_engine.errors import CheckpointFormatError
from checkpoint_engine.source.segment import Segment

__all__ = ["SETTLING", "FileWatch"]

_TICK = 0.05
_TICKS_PER_SAMPLE = 20
"""Times of change are looked at in every tick, samples of the bytes every so many ticks."""

SETTLING = 3 * _TICK
"""Seconds after which a file that was written to has been noticed, and whoever reads it is refused."""

_log = logging.getLogger(__name__)


class FileWatch:
    """Checkpoints that lie in files and are shared; those that somebody writes to are given up."""

    def __init__(self, give_up: Callable[[str], None]) -> None:
        """Takes what ends the sharing of a checkpoint; a thread runs while there is anything to look at."""
        self._give_up = give_up
        self._lock = threading.Lock()
        self._watched: dict[str, list[Segment]] = {}
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, name: str, files: list[Segment]) -> None:
        """Looks at these files from now on, until `remove`."""
        if not files:
            return
        with self._lock:
            self._watched[name] = files
            if self._thread is None:
                self._woken.clear()
                self._thread = threading.Thread(target=self._run, name="checkpoint-engine-files", daemon=True)
                self._thread.start()

    def remove(self, name: str) -> None:
        """Looks at them no longer; they may be closed."""
        with self._lock:
            self._watched.pop(name, None)
            if not self._watched:
                self._woken.set()

    def close(self) -> None:
        """Looks at nothing any more."""
        with self._lock:
            self._watched.clear()
            self._woken.set()

    def _run(self) -> None:
        tick = 0
        while True:
            ended = self._woken.wait(_TICK)
            tick += 1
            with self._lock:
                if ended and not self._watched:
                    self._thread = None
                    return
                self._woken.clear()
                for name in [name for name, files in self._watched.items() if _written(files, tick)]:
                    self._give_up(name)
                    del self._watched[name]
                if not self._watched:
                    self._thread = None
                    return


def _written(files: list[Segment], tick: int) -> bool:
    try:
        for file in files:
            file.check(samples=tick % _TICKS_PER_SAMPLE == 0)
    except (CheckpointFormatError, OSError) as error:
        _log.warning("nobody can read from here any more what was shared: %s", error)
        return True
    return False
