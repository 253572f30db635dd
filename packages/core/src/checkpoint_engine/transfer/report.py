"""What an update tells about itself, while it runs and afterwards."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from checkpoint_engine.contract.figures import ComparisonFigures, UpdateFigures
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.transfer.trace import PHASES, RankTrace, Span, Trace

__all__ = ["Progress", "StageClock", "UpdateReport"]


@dataclass
class Progress:
    """How far an update is; written by the thread that runs it, read by any other."""

    phase: Phase = Phase.IDLE
    buckets_done: int = 0
    buckets: int = 0
    bytes_done: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class UpdateReport:
    """One finished update as one rank saw it; it goes as it stands to the command line and over HTTP.

    `seconds` holds `total` and a figure for each stage: `connect` (until the engine's workers are there), `copy`
    (host to device), `broadcast`, `load` (in the engine's loader) and `finish`. Stages overlap, so they add up to more
    than the total. `paused` is what the engine's users feel: from asking it to pause to its answer that it runs again;
    it is there on the rank that asked, if that went through one of our clients. `staging_kept` is how many bytes of
    staging outlive the update. `engine` holds what this rank's engine worker tells of itself; `trace` says when all
    that was, if it was asked for.
    """

    version: str
    method: str
    nbytes: int
    tensors: int
    buckets: int
    bucket_size: int
    staging: str
    staging_kept: int
    seconds: dict[str, float]
    engine: dict[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    trace: RankTrace | None = None

    @property
    def figures(self) -> UpdateFigures:
        """What the engine worker tells of an update that it took."""
        return UpdateFigures.from_details(self.engine)

    @property
    def comparison(self) -> ComparisonFigures:
        """What it tells of a comparison."""
        return ComparisonFigures.from_details(self.engine)


@dataclass
class StageClock:
    """Adds up seconds by stage, and keeps a trace if there is one."""

    trace: Trace | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _start: float = field(default_factory=time.perf_counter)

    def add(self, stage: str, seconds: float) -> None:
        """Adds to a stage."""
        self.seconds[stage] += seconds

    def lap(self, stage: str, since: float) -> float:
        """Adds the time since `since` (of `time.perf_counter`) to a stage; returns now."""
        now = time.perf_counter()
        self.seconds[stage] += now - since
        self.note(stage, since)
        return now

    def note(self, name: str, since: float) -> None:
        """The time since `since` shows in the trace only."""
        if self.trace is not None:
            self.trace.spans.append(Span(PHASES, name, since, time.perf_counter()))

    def step(self, name: str) -> AbstractContextManager[None]:
        """A part of a phase; it shows in the trace only."""
        return contextlib.nullcontext() if self.trace is None else self.trace.step(name)

    def total(self) -> dict[str, float]:
        """All stages, and the time since this clock was made."""
        return {**self.seconds, "total": time.perf_counter() - self._start}
