"""Processes that start at once: they are forked from one that has imported torch, and has no threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType

from typing_extensions import Self

from tests.core.cluster import TIMEOUT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["checkpoint_engine.server.parameter_server", "checkpoint_engine.receiver.reception"])


class Forked:
    """Runs `target(pipe, *arguments)`, with the environment of this process as it is now and more."""

    def __init__(
        self, target: Callable[..., None], *arguments: object, environment: Mapping[str, str] | None = None
    ) -> None:
        self._pipe, theirs = _context.Pipe()
        first = (theirs, os.environ | (environment or {}), target)
        self._process = _context.Process(target=_run, args=(*first, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def say(self, what: object) -> None:
        self._pipe.send(what)

    def hear(self) -> object:
        if not self._pipe.poll(TIMEOUT):
            raise TimeoutError(f"process {self.pid} did not answer")
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def signal(self, name: str) -> None:
        os.kill(self.pid, signal.Signals[name])

    def kill(self) -> None:
        self.signal("SIGKILL")
        self._process.join(10)

    def close(self) -> None:
        """May be called again."""
        self._pipe.close()
        self._process.join(10)
        if self._process.exitcode is None:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever it does: it may be halted."""
        if self._process.exitcode is None:
            self.kill()
        self._pipe.close()


def _run(pipe: Connection, environment: dict[str, str], target: Callable[..., None], *arguments: object) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(pipe, *arguments)
    os._exit(0)  # nothing of a test's own is left to be done, and Mooncake takes seconds to end
