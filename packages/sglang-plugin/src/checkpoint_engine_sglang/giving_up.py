"""How the server's front tells workers, which are busy with an update, to give it up.

A worker of SGLang reads no request while it takes an update. The front and the workers of its host share a directory,
where a file appears; workers of other hosts give up because the parameter server then does.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from checkpoint_engine.sdk import Cancel, WorkerError
from checkpoint_engine.sdk.directories import OwnedDirectory

__all__ = ["GiveUpFile", "giving_up"]

_POLL_SECONDS = 0.1


class GiveUpFile:
    """The front's end, for one order; the file's name is nobody else's."""

    def __init__(self) -> None:
        self._directory = OwnedDirectory("order")
        self.path = self._directory.path / "give-up"

    def appear(self) -> None:
        """Tells the workers."""
        self.path.touch()

    def close(self) -> None:
        """Once the order is over."""
        self._directory.close()


@contextmanager
def giving_up(path: str) -> Generator[Cancel]:
    """A switch that is thrown once there is a file; never, if the path is empty."""
    cancel, over = Cancel(), threading.Event()
    if not path:
        yield cancel
        return

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            if Path(path).exists():
                cancel.set(WorkerError("the engine was told to give the update up (POST /checkpoint_engine/abort)"))
                return

    watcher = threading.Thread(target=watch, name="checkpoint-engine-give-up", daemon=True)
    watcher.start()
    try:
        yield cancel
    finally:
        over.set()
        watcher.join()
