"""Starts the ranks of an update as processes, watches over them and collects what they report."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import IO

import msgspec
from typing_extensions import Self

from checkpoint_engine import limits
from checkpoint_engine.cli.messages import (
    UNASKED,
    AbortJob,
    Done,
    FromParent,
    FromRank,
    Job,
    JobFailed,
    Logged,
    PeerLost,
    Progressed,
)
from checkpoint_engine.client.auto import load_client
from checkpoint_engine.client.plugins import settling_client
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, RankError, error_named
from checkpoint_engine.owned_directory import temporary_root
from checkpoint_engine.processes import Child, StoppedWatch, end_all
from checkpoint_engine.settings import SECRET_VARIABLE

__all__ = ["Listener", "Ranks"]

_RANK_MODULE = "checkpoint_engine.cli.rank"
_TAIL_LINES = 15
_TICK_SECONDS = 0.5


class _Ended(msgspec.Struct, frozen=True):
    """A rank's process has ended."""

    how: str


_Event = tuple[int, FromRank | _Ended]
_EventOfJob = tuple[int, Progressed | Logged | Done | JobFailed | _Ended]
Listener = Callable[[Progressed | Logged], None]


class Ranks:
    """The rank processes of this host; they live until `close`, one job after the other."""

    def __init__(
        self, count: int, *, device: str | None = None, verbose: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self._jobs = 0
        self._phase = Phase.START
        """Of the job that runs, as the first rank has it."""
        self._ended: dict[int, _Ended] = {}
        self._over: dict[int, Done | JobFailed] = {}
        """What ranks have said of the job that runs; whoever interrupts it has not to wait for those again."""
        self._stopped = StoppedWatch()
        self._doubted: dict[int, Deadline] = {}
        """Ranks that another one calls lost, and how long they have to speak for themselves."""
        self._put_down: dict[int, str] = {}
        """Ranks that were ended here, and why."""
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._logs = [None if verbose else _open_log() for _ in range(count)]
        common = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            SECRET_VARIABLE: secrets.token_hex(32),  # nobody else's rank comes between these
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cpus() // count)),
            **(environment or {}),
        }
        arguments = [_RANK_MODULE, *(["--device", device] if device else []), *(["--verbose"] if verbose else [])]
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
        self._phase, self._doubted, self._over = Phase.START, {}, {}
        try:
            return self._run(job, listener)
        except KeyboardInterrupt as interrupt:
            # The engines shall not stay paused because somebody lost patience.
            why = RankError(str(interrupt) or "interrupted by the user")
            interrupted = JobFailed(job.number, Failure.of(why, Phase.UPDATE, 0))
            failures = self._collect_failures(None, interrupted, listener)
            raise self._explain(failures or {0: interrupted}, job) from None

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
                    raise self._explain({rank: event}, None)

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
            raise self._explain({rank: ended}, None)
        self._tell_all(job)
        done: dict[int, Done] = {}
        deadline = Deadline(job.patience.wait + job.patience.timeout + limits.PARENT_MARGIN)
        while len(done) < len(self._children):
            rank, event = self._next(deadline, job)
            if isinstance(event, Progressed | Logged):
                self._phase = event.phase if isinstance(event, Progressed) else self._phase
                listener(event)
            elif isinstance(event, Done):
                done[rank] = event
            else:
                failures = {rank: event, **self._collect_failures(rank, event, listener)}
                raise self._explain(failures, job)
        return [done[rank] for rank in sorted(done)]

    def _tell_all(self, message: FromParent, but: Sequence[int] = ()) -> None:
        for rank, child in enumerate(self._children):
            if rank not in but:
                child.send(msgspec.json.encode(message))

    def _next(self, deadline: Deadline, job: Job) -> _EventOfJob:
        try:
            return self._next_of_job(deadline)
        except queue.Empty:
            raise DeadlineError(
                f"the ranks neither finished nor failed within {deadline.said} "
                f"(--wait {job.patience.wait:g} and --timeout {job.patience.timeout:g}, and a "
                "minute more); see --verbose"
            ) from None

    def _next_of_job(self, deadline: Deadline) -> _EventOfJob:
        """The next event that is not a late word about an earlier job."""
        while True:
            self._end_the_mute()
            try:
                rank, event = self._events.get(timeout=min(_TICK_SECONDS, deadline.remaining))
            except queue.Empty:
                if deadline.expired:
                    raise
                continue
            if isinstance(event, PeerLost):
                self._doubted.setdefault(event.rank, Deadline(limits.EXPLANATION))
                continue
            if isinstance(event, Done | JobFailed):
                self._doubted.pop(rank, None)
            if isinstance(event, Done | JobFailed) and event.job in (0, self._jobs):
                self._over[rank] = event
            if isinstance(event, _Ended):
                event = self._ended[rank] = _Ended(self._put_down.get(rank, event.how))
            if not isinstance(event, Done | JobFailed) or event.job in (0, self._jobs):
                return rank, event

    def _end_the_mute(self) -> None:
        """Ends ranks that are stopped or hung: whoever waits for them, in an engine too, learns it at once then."""
        for rank, child in enumerate(self._children):
            if rank in self._ended or rank in self._put_down:
                continue
            if self._stopped.overdue(child.pid):
                why = f"was stopped (SIGSTOP) and did nothing for {limits.SILENCE:g} s"
            elif rank in self._doubted and self._doubted[rank].expired:
                why = "gave no sign of life"
            else:
                continue
            self._put_down[rank] = f"(pid {child.pid}) {why}; this command has ended it"
            child.kill()

    def _collect_failures(
        self, first: int | None, event: JobFailed | _Ended, listener: Listener
    ) -> dict[int, JobFailed | _Ended]:
        """Makes the other ranks give up, and waits until they have."""
        how = f"rank {first} {event.how}" if isinstance(event, _Ended) else event.failure.message
        self._tell_all(AbortJob(how, self._jobs), but=() if first is None else [first])
        others = set(range(len(self._children))) - {first}
        deadline = Deadline(limits.PARENT_SETTLE)
        with contextlib.suppress(queue.Empty):
            while others - self._over.keys() - self._ended.keys():
                _, other = self._next_of_job(deadline)
                if isinstance(other, Logged):
                    listener(other)
        said = {**self._ended, **self._over}
        return {rank: each for rank, each in said.items() if rank in others and not isinstance(each, Done)}

    def _explain(self, failures: dict[int, JobFailed | _Ended], job: Job | None) -> CheckpointEngineError:
        """The error that says most: a rank that died, then the first that has a cause of its own."""
        engines = list(dict.fromkeys(f.engine for f in failures.values() if isinstance(f, JobFailed) and f.engine))
        for rank, failure in failures.items():
            if isinstance(failure, _Ended):
                doing = f" in phase '{self._phase}'" if job is not None else ""
                orphans = [] if job is None else self._settle_orphans(job, failures)
                unasked = [] if job is None else self._unasked(job, failures)
                said = [f"rank {rank} {failure.how}{doing}{self._tail(rank)}", *engines, *orphans, *unasked]
                return RankError("\n".join(said))
        reports = [(rank, failure) for rank, failure in failures.items() if isinstance(failure, JobFailed)]
        rank, failure = min(reports, key=lambda item: item[1].secondary)
        notes = [engine for engine in engines if engine not in failure.failure.message]
        return _as_error(rank, failure, notes, self._tail)

    def _settle_orphans(self, job: Job, failures: dict[int, JobFailed | _Ended]) -> list[str]:
        """Has engines serve whose rank died before it could, if their weights are whole; says what they hold."""
        endpoints = self._led_by(job, [rank for rank, failure in failures.items() if isinstance(failure, _Ended)])
        with ThreadPoolExecutor(max(1, len(endpoints))) as pool:
            return list(pool.map(partial(_settle_orphan, job.engines.kind), endpoints))

    def _unasked(self, job: Job, failures: dict[int, JobFailed | _Ended]) -> list[str]:
        """What engines hold whose ranks gave up before the update itself."""
        early = [rank for rank, failure in failures.items() if isinstance(failure, JobFailed) and failure.early]
        return [f"{each} {UNASKED}" for each in self._led_by(job, early)]

    def _led_by(self, job: Job, ranks: Sequence[int]) -> list[str]:
        """The engines that these ranks ask."""
        led = (number for rank in ranks for number in job.engines.led_by(rank, len(self._children)))
        return [job.engines.endpoints[number] for number in led]

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


def _as_error(rank: int, failed: JobFailed, notes: list[str], tail: Callable[[int], str]) -> CheckpointEngineError:
    message = "\n".join([failed.failure.message, *notes])
    if failed.of_update:
        return failed.failure.as_error(message)
    kind = error_named(failed.failure.error)
    if kind is not None:
        return kind(message)
    return RankError(f"rank {rank} failed with {failed.failure.error}: {message}{tail(rank)}")


def _settle_orphan(kind: str, endpoint: str) -> str:
    try:
        return settling_client(load_client(kind)(endpoint)).settle_orphan(Deadline(limits.SETTLE))
    except CheckpointEngineError as error:
        return f"{endpoint}: what it holds now is unknown, and it may be paused ({error}): update again"


def _open_log() -> IO[bytes]:
    return tempfile.TemporaryFile(dir=temporary_root())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
