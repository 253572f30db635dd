"""What one rank did when, during one update; and the ranks' traces as one file for Perfetto or chrome://tracing."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from checkpoint_engine.errors import SettingError

if TYPE_CHECKING:
    from checkpoint_engine.device import Event, Stream

__all__ = ["LANES", "PHASES", "DeviceClock", "RankTrace", "Span", "Trace", "chrome_trace", "covered", "save_trace"]

PHASES = "phases"
"""The lane of what happens before and after the buckets; its spans may lie within each other."""

LANES = (PHASES, "read", "copy", "broadcast", "load")
"""From top to bottom. `read` is from another host, `copy` from host memory to the device, `load` in the engine."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GB = 1e9


@dataclass(frozen=True)
class Span:
    """Something that took time, from `begin` to `end` in seconds on the host's monotonic clock."""

    lane: str
    name: str
    begin: float
    end: float
    bucket: int | None = None
    nbytes: int = 0


def covered(spans: Sequence[Span]) -> float:
    """Seconds during which at least one of the spans lasted."""
    seconds, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        seconds += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return seconds


@dataclass(frozen=True)
class RankTrace:
    """One rank's part of an update.

    Ranks with the same `boot` read the same monotonic clock. `wall` is what to add to it for Unix time.
    """

    rank: int
    device: str
    host: str
    boot: str
    wall: float
    spans: tuple[Span, ...]


@dataclass
class Trace:
    """Collects the spans of one update on one rank."""

    spans: list[Span] = field(default_factory=list[Span])

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """A span of the lane of phases."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(PHASES, name, begin, time.perf_counter()))

    def finish(self, rank: int, device: str) -> RankTrace:
        """What was collected."""
        wall = time.time() - time.perf_counter()
        return RankTrace(rank, device, socket.gethostname(), _boot(), wall, tuple(self.spans))


class DeviceClock:
    """Tells the host's time of events on a device, by one event whose time both know."""

    def __init__(self, stream: Stream) -> None:
        """Waits for the stream, which should be empty."""
        self._reference = stream.record()
        self._reference.synchronize()
        self._time = time.perf_counter()

    def at(self, event: Event) -> float:
        """When the device came to an event, in seconds on the host's monotonic clock."""
        return self._time + event.seconds_since(self._reference)


def chrome_trace(traces: Sequence[RankTrace], **about: object) -> dict[str, Any]:
    """All ranks' traces in Chrome's JSON format: a process for each rank, a thread for each lane.

    Times are microseconds since the first span. Ranks of one host share a clock; other hosts are brought into line by
    their wall clocks, which is as good as those are synchronised.

    Args:
        traces: At least one.
        about: What else the file shall say, such as the version.
    """
    shifts = _shifts(traces)
    start = min((span.begin + shifts[trace.boot] for trace in traces for span in trace.spans), default=0.0)
    events: list[dict[str, Any]] = []
    for trace in sorted(traces, key=lambda trace: trace.rank):
        events += _names(trace)
        shift = shifts[trace.boot] - start
        events += [_event(trace.rank, span, shift) for span in sorted(trace.spans, key=lambda s: (s.begin, -s.end))]
    clock = "monotonic clock of one host" if len(shifts) == 1 else "wall clocks of several hosts"
    return {"displayTimeUnit": "ms", "otherData": {**about, "clock": clock}, "traceEvents": events}


def save_trace(path: Path, traces: Sequence[RankTrace], **about: object) -> None:
    """Writes `chrome_trace` to a file.

    Raises:
        SettingError: it cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.encode(chrome_trace(traces, **about)) + b"\n")
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error.strerror}") from error


def _shifts(traces: Sequence[RankTrace]) -> dict[str, float]:
    """What to add to the clock of each host; nothing if there is one host, whose clock is exact."""
    first: dict[str, float] = {}
    for trace in traces:
        first.setdefault(trace.boot, trace.wall)
    return first if len(first) > 1 else dict.fromkeys(first, 0.0)


def _names(trace: RankTrace) -> list[dict[str, Any]]:
    def name(kind: str, thread: int, **arguments: object) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": trace.rank, "tid": thread, "args": arguments}

    used = {span.lane for span in trace.spans}
    events = [
        name("process_name", 0, name=f"rank {trace.rank} · {trace.device} · {trace.host}"),
        name("process_sort_index", 0, sort_index=trace.rank),
    ]
    for index, lane in enumerate(LANES):
        if lane in used:
            events += [name("thread_name", index, name=lane), name("thread_sort_index", index, sort_index=index)]
    return events


def _event(rank: int, span: Span, shift: float) -> dict[str, Any]:
    seconds = span.end - span.begin
    arguments: dict[str, Any] = {}
    if span.bucket is not None:
        arguments["bucket"] = span.bucket
    if span.nbytes:
        arguments |= {"bytes": span.nbytes, "GB/s": round(span.nbytes / seconds / _GB, 3) if seconds > 0 else None}
    return {
        "ph": "X",
        "cat": span.lane,
        "name": span.name,
        "pid": rank,
        "tid": LANES.index(span.lane),
        "ts": round((span.begin + shift) * 1e6, 3),
        "dur": round(max(seconds, 0.0) * 1e6, 3),
        "args": arguments,
    }


@functools.cache
def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
