"""Child processes that take requests and answer, a line each way, and never outlive their parent.

What travels is bytes without line breaks; who uses this decides what they mean.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from checkpoint_engine import limits
from checkpoint_engine.deadline import Deadline

__all__ = ["Child", "ParentPipe", "StoppedWatch", "end_all", "is_stopped", "python_module"]

_RUN_MODULE = "import runpy, sys; del sys.path[0], sys.argv[0]; runpy.run_module(sys.argv[0], None, '__main__', True)"


class StoppedWatch:
    """Tells which processes of this host have been stopped, as by SIGSTOP, for longer than they may be."""

    def __init__(self, patience: float = limits.SILENCE) -> None:
        self._patience = patience
        self._since: dict[int, Deadline] = {}

    def overdue(self, pid: int) -> bool:
        """Whether it is; to be asked again and again. False of a process that cannot be seen from here."""
        if not is_stopped(pid):
            self._since.pop(pid, None)
            return False
        return self._since.setdefault(pid, Deadline(self._patience)).expired


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped now, so that it does nothing until somebody continues it."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return False
    return after_name.split()[0] in "Tt"


def python_module(module: str) -> list[str]:
    """The command that runs a module as `python -m` does, but imports nothing from the directory where it is called.

    What lies there may be anybody's: /tmp, or a checkout of something that has the same names.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _RUN_MODULE, module]


class Child:
    """A Python module run as a child process.

    `on_line` is called, in a thread of this object, for every line that the child writes, then `on_end`
    when it has ended.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        on_line: Callable[[Child, bytes], None],
        on_end: Callable[[Child], None],
        environment: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self.name = name
        self._on_line, self._on_end = on_line, on_end
        self._process = subprocess.Popen(
            [*python_module(arguments[0]), *arguments[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **(environment or {})},
            # Ctrl-C is for the parent, which then ends its children in order.
            start_new_session=True,
        )
        self._input = cast("IO[bytes]", self._process.stdin)
        self._output = cast("IO[bytes]", self._process.stdout)
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"reads {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def send(self, line: bytes) -> None:
        """Writes a line to the child; does nothing if it is gone, which `on_end` tells."""
        with self._sending, contextlib.suppress(OSError, ValueError):
            self._input.write(line + b"\n")
            self._input.flush()

    def ask_to_end(self) -> None:
        """Closes the child's input, which a `ParentPipe` takes as the request to end."""
        with self._sending, contextlib.suppress(OSError):
            self._input.close()

    def wait(self, deadline: Deadline) -> bool:
        """Waits for the end; returns whether it came."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(deadline.remaining)
        return not self.running

    def kill(self) -> None:
        """Ends the child at once."""
        self._process.kill()

    def close(self) -> None:
        """Frees what belongs to a child that has ended."""
        self._process.wait()
        self._reader.join()
        self.ask_to_end()
        self._output.close()

    def describe_end(self) -> str:
        """How it ended, such as `was killed by SIGKILL`."""
        code = self._process.poll()
        if code is None:
            return "still runs"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    def _read(self) -> None:
        for line in self._output:
            self._on_line(self, line.rstrip(b"\n"))
        self._process.wait()
        self._on_end(self)


def end_all(children: Iterable[Child], grace: float = limits.PROCESS_GRACE) -> None:
    """Asks children to end, kills those that have not after `grace` seconds, and frees them all."""
    children = list(children)
    for child in children:
        child.ask_to_end()
    deadline = Deadline(grace)
    for child in children:
        if not child.wait(deadline):
            child.kill()
    for child in children:
        child.close()


class ParentPipe:
    """The child's end. Takes over standard input and output; what anybody prints goes to standard error instead."""

    def __init__(self, grace: float = limits.BOARD_LEAVE) -> None:
        """Starts to listen; once the parent is gone, this process has `grace` seconds left."""
        self._grace = grace
        self._output = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._input = os.fdopen(os.dup(0), "rb")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self._sending = threading.Lock()
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="reads the parent", daemon=True).start()

    def lines(self) -> Iterator[bytes]:
        """What the parent sends, until it closes the pipe or is gone."""
        while (line := self._lines.get()) is not None:
            yield line

    def send(self, line: bytes) -> None:
        """Writes a line to the parent; if that is gone, this process ends soon."""
        with self._sending, contextlib.suppress(OSError):
            self._output.write(line + b"\n")

    def _read(self) -> None:
        for line in self._input:
            self._lines.put(line.rstrip(b"\n"))
        self._lines.put(None)
        # Whoever works on a request now works for nobody.
        time.sleep(self._grace)
        os._exit(1)
