"""Starts the ranks of an update as processes, watches over them and collects what they report."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import IO

import msgspec
from typing_extensions import Self

from checkpoint_engine import errors
from checkpoint_engine.cli.messages import Abort, Done, Failed, FromParent, FromRank, Job, Logged, Progressed
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, RankError, UpdateError
from checkpoint_engine.processes import Child, end_all

RANK_MODULE = "checkpoint_engine.cli.rank"
_SETTLE_SECONDS = 45.0
"""After one rank has failed, the others get so long to put their engines into a known state."""
_MARGIN_SECONDS = 60.0
"""Ranks keep their own deadlines; only a rank that is stuck beyond them meets this one."""
_TAIL_LINES = 15


class _Ended(msgspec.Struct, frozen=True):
    """A rank's process has ended."""

    how: str


_Event = tuple[int, FromRank | _Ended]
Listener = Callable[[Progressed | Logged], None]


class Ranks:
    """The rank processes of this host; they live until `close`, one job after the other."""

    def __init__(
        self, count: int, *, device: str | None = None, verbose: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self._jobs = 0
        self._ended: dict[int, _Ended] = {}
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._logs = [None if verbose else _open_log() for _ in range(count)]
        common = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cpus() // count)),
            **(environment or {}),
        }
        arguments = [RANK_MODULE, *(["--device", device] if device else []), *(["--verbose"] if verbose else [])]
        self._children = [
            Child(
                f"rank {rank}",
                arguments,
                on_line=partial(self._take, rank),
                on_end=partial(self._note_end, rank),
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                log=log,
            )
            for rank, log in enumerate(self._logs)
        ]

    @property
    def pids(self) -> list[int]:
        """Process numbers in order of rank."""
        return [child.pid for child in self._children]

    def run(self, job: Job, listener: Listener) -> list[Done]:
        """Has all ranks do a job; returns their reports in order of rank.

        After an `UpdateError` the ranks can do another job; after any other error they are to be closed.

        Raises:
            CheckpointEngineError: what the first rank that failed says.
        """
        self._jobs += 1
        job = msgspec.structs.replace(job, number=self._jobs)
        try:
            return self._run(job, listener)
        except KeyboardInterrupt:
            # The engines shall not stay paused because somebody lost patience.
            interrupted = Failed(job.number, "RankError", "interrupted by the user")
            failures = self._collect_failures(None, interrupted, set(), listener)
            raise self._explain(failures or {0: interrupted}) from None

    def wait(self, seconds: float) -> None:
        """Lets the ranks live on, holding their memory.

        Raises:
            RankError: one of them ended meanwhile.
        """
        deadline = Deadline(seconds)
        with contextlib.suppress(queue.Empty):
            while True:
                rank, event = self._events.get(timeout=deadline.remaining)
                if isinstance(event, _Ended):
                    raise self._explain({rank: event})

    def close(self) -> None:
        """Ends all ranks."""
        end_all(self._children)
        for log in self._logs:
            if log is not None:
                log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, job: Job, listener: Listener) -> list[Done]:
        for rank, ended in self._ended.items():
            raise self._explain({rank: ended})
        self._tell_all(job)
        done: dict[int, Done] = {}
        deadline = Deadline(job.wait + job.timeout + _MARGIN_SECONDS)
        while len(done) < len(self._children):
            rank, event = self._next(deadline, job)
            if isinstance(event, Progressed | Logged):
                listener(event)
            elif isinstance(event, Done):
                done[rank] = event
            else:
                failures = {rank: event, **self._collect_failures(rank, event, set(done), listener)}
                raise self._explain(failures)
        return [done[rank] for rank in sorted(done)]

    def _tell_all(self, message: FromParent, but: Sequence[int] = ()) -> None:
        for rank, child in enumerate(self._children):
            if rank not in but:
                child.send(msgspec.json.encode(message))

    def _next(self, deadline: Deadline, job: Job) -> _Event:
        try:
            return self._next_of_job(deadline)
        except queue.Empty:
            raise DeadlineError(
                f"the ranks neither finished nor failed within {deadline.seconds:g} s (--wait {job.wait:g} and "
                f"--timeout {job.timeout:g}, and a minute more); see --verbose"
            ) from None

    def _next_of_job(self, deadline: Deadline) -> _Event:
        """The next event that is not a late word about an earlier job."""
        while True:
            rank, event = self._events.get(timeout=deadline.remaining)
            if isinstance(event, _Ended):
                self._ended[rank] = event
            if not isinstance(event, Done | Failed) or event.job in (0, self._jobs):
                return rank, event

    def _collect_failures(
        self, first: int | None, event: Failed | _Ended, over: set[int], listener: Listener
    ) -> dict[int, Failed | _Ended]:
        """Makes the other ranks give up, and waits until they have."""
        how = f"rank {first} {event.how}" if isinstance(event, _Ended) else event.message
        self._tell_all(Abort(how, self._jobs), but=() if first is None else [first])
        others = set(range(len(self._children))) - {first}
        failures: dict[int, Failed | _Ended] = {}
        deadline = Deadline(_SETTLE_SECONDS)
        with contextlib.suppress(queue.Empty):
            while others - failures.keys() - self._ended.keys() - over:
                rank, other = self._next_of_job(deadline)
                if isinstance(other, Logged):
                    listener(other)
                elif isinstance(other, Done):
                    over.add(rank)
                elif not isinstance(other, Progressed) and rank != first:
                    failures.setdefault(rank, other)
        return failures

    def _explain(self, failures: dict[int, Failed | _Ended]) -> CheckpointEngineError:
        """The error that says most: a rank that died, then the first that has a cause of its own."""
        engines = list(dict.fromkeys(f.engine for f in failures.values() if isinstance(f, Failed) and f.engine))
        for rank, failure in failures.items():
            if isinstance(failure, _Ended):
                return RankError("\n".join([f"rank {rank} {failure.how}{self._tail(rank)}", *engines]))
        reports = [(rank, failure) for rank, failure in failures.items() if isinstance(failure, Failed)]
        rank, failure = min(reports, key=lambda item: item[1].secondary)
        notes = [engine for engine in engines if engine not in failure.message]
        return _as_error(rank, failure, notes, self._tail)

    def _tail(self, rank: int) -> str:
        log = self._logs[rank]
        if log is None:
            return ""
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        return "".join(f"\n    {line}" for line in lines)

    def _take(self, rank: int, _child: Child, line: bytes) -> None:
        self._events.put((rank, msgspec.json.decode(line, type=FromRank)))  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _note_end(self, rank: int, child: Child) -> None:
        self._events.put((rank, _Ended(f"(pid {child.pid}) {child.describe_end()}")))


def _as_error(rank: int, failure: Failed, notes: list[str], tail: Callable[[int], str]) -> CheckpointEngineError:
    message = "\n".join([failure.message, *notes])
    if failure.error == "UpdateError":
        return UpdateError(message, rank=failure.rank, phase=failure.phase, kind=failure.kind)
    kind = getattr(errors, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, CheckpointEngineError):
        return kind(message)
    return RankError(f"rank {rank} failed with {failure.error}: {message}{tail(rank)}")


def _open_log() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
