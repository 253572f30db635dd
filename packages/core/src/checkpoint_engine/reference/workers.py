"""The worker processes of a reference engine, as its front sees them."""

from __future__ import annotations

import itertools
import threading
from functools import partial
from typing import Any

import msgspec

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, WorkerError
from checkpoint_engine.processes import Child, end_all

__all__ = ["FRONT_FAULTS", "READY", "WORKER_FAULTS", "Answer", "Request", "Workers"]

_WORKER_MODULE = "checkpoint_engine.reference.worker"
FRONT_FAULTS = ("error500", "hang")
WORKER_FAULTS = ("refuse", "die-in-load", "raise-in-load", "stall-in-load", "raise-in-finish")
"""Things that go wrong on request, once, for tests; in a worker it is the last one that fails."""

READY = 0
"""The id under which a worker reports that it has come up."""


class Request(msgspec.Struct, frozen=True):
    """A method to run on a worker."""

    id: int
    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class Answer(msgspec.Struct, frozen=True):
    """What it returned, or why it failed."""

    id: int
    result: Any = None
    error: str = ""


class Workers:
    """One process for each tensor-parallel rank. Any of them that ends makes every call fail from then on."""

    def __init__(self, count: int, spec: str, device: str, fault: str) -> None:
        self._count = count
        self._changed = threading.Condition()
        self._answers: dict[int, dict[int, Answer]] = {READY: {}}
        self._ended: str | None = None
        self._calling = threading.Lock()
        self._ids = itertools.count(READY + 1)
        self._children = [self._start(rank, spec, device, fault) for rank in range(count)]

    @property
    def ready(self) -> bool:
        """Whether all workers are up."""
        with self._changed:
            return self._ended is None and len(self._answers[READY]) == self._count

    @property
    def pids(self) -> list[int]:
        """Process numbers in order of rank."""
        return [child.pid for child in self._children]

    def call(self, request: Request, timeout: float) -> list[Any]:
        """Runs a method on all workers, after those asked for before; returns their results in order of rank.

        Raises:
            WorkerError: a worker raised, or has ended.
            DeadlineError: a worker did not answer in time.
        """
        deadline = Deadline(timeout)
        if not self._calling.acquire(timeout=deadline.remaining):
            raise DeadlineError(f"the workers were busy for {timeout:g} s; {request.method!r} did not run")
        try:
            return self._call(msgspec.structs.replace(request, id=next(self._ids)), deadline)
        finally:
            self._calling.release()

    def close(self) -> None:
        """Ends all workers."""
        end_all(self._children)

    def _call(self, request: Request, deadline: Deadline) -> list[Any]:
        with self._changed:
            answers = self._answers.setdefault(request.id, {})
        for child in self._children:
            child.send(msgspec.json.encode(request))
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(answers) == self._count, deadline.remaining)
            del self._answers[request.id]
            if self._ended:
                raise WorkerError(self._ended)
            if len(answers) < self._count:
                late = [rank for rank in range(self._count) if rank not in answers]
                raise DeadlineError(f"worker {late} did not finish {request.method!r} in {deadline.said}")
        for rank in range(self._count):
            if answers[rank].error:
                raise WorkerError(f"worker {rank}: {answers[rank].error}")
        return [answers[rank].result for rank in range(self._count)]

    def _start(self, rank: int, spec: str, device: str, fault: str) -> Child:
        arguments = [_WORKER_MODULE, "--spec", spec, "--device", device]
        arguments += ["--tp-rank", str(rank), "--tp-size", str(self._count)]
        if fault in WORKER_FAULTS and rank == self._count - 1:
            arguments += ["--fault", fault]
        return Child(
            f"worker {rank}",
            arguments,
            on_line=partial(self._take_answer, rank),
            on_end=partial(self._note_end, rank),
            environment={"OMP_NUM_THREADS": "1"},
        )

    def _take_answer(self, rank: int, _child: Child, line: bytes) -> None:
        answer = msgspec.json.decode(line, type=Answer)
        with self._changed:
            if answer.id in self._answers:  # nobody waits any more for an answer that came too late
                self._answers[answer.id][rank] = answer
                self._changed.notify_all()

    def _note_end(self, rank: int, child: Child) -> None:
        with self._changed:
            self._ended = self._ended or f"worker {rank} (pid {child.pid}) {child.describe_end()}"
            self._changed.notify_all()
