"""A trace file as the timeline shows it: lanes of bars, how busy they were, and what the update could have taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from checkpoint_engine.errors import SettingError
from checkpoint_engine.transfer.trace import LANES, PHASES

__all__ = ["Bar", "Lane", "Limit", "Timeline", "load_timeline"]

_BUS_LANES = ("read", "copy")
"""Each byte takes these once, on the rank that owns it."""


@dataclass(frozen=True)
class Bar:
    """One span, in seconds since the update began. Until `ready`, it waited for other ranks."""

    name: str
    begin: float
    ready: float
    end: float
    bucket: int | None
    nbytes: int
    depth: int = 0


@dataclass(frozen=True)
class Lane:
    """What one rank did in one stage."""

    rank: int
    stage: str
    bars: tuple[Bar, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all bars."""
        return sum(bar.nbytes for bar in self.bars)

    @property
    def busy(self) -> float:
        """Seconds in which it worked."""
        return _covered((bar.ready, bar.end) for bar in self.bars)

    @property
    def rate(self) -> float:
        """Bytes a second while it worked."""
        return self.nbytes / self.busy if self.busy else 0.0


@dataclass(frozen=True)
class Limit:
    """The least that the update could take: `seconds`, for `nbytes` into one rank at `rate` bytes a second."""

    seconds: float
    nbytes: int
    rate: float
    measured: bool


@dataclass(frozen=True)
class Timeline:
    """A whole update."""

    about: dict[str, Any]
    names: dict[int, str]
    lanes: tuple[Lane, ...]

    @property
    def seconds(self) -> float:
        """From the first thing to the last."""
        return max((bar.end for lane in self.lanes for bar in lane.bars), default=0.0)

    def limit(self, rate: float | None) -> Limit | None:
        """What the slowest link allows; None if nothing came over it.

        Args:
            rate: Bytes a second into one rank; as fast as the trace shows it if None.
        """
        bus = [lane for lane in self.lanes if lane.stage in _BUS_LANES and lane.nbytes]
        if not bus:
            return None
        slowest = max(bus, key=lambda lane: lane.nbytes / (rate or lane.rate))
        speed = rate or slowest.rate
        return Limit(slowest.nbytes / speed, slowest.nbytes, speed, rate is None)


class _Event(msgspec.Struct):
    ph: str
    name: str
    pid: int
    ts: float = 0.0
    dur: float = 0.0
    cat: str = ""
    args: dict[str, Any] = {}


class _File(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815 - Chrome's name
    otherData: dict[str, Any] = {}  # noqa: N815


def load_timeline(path: Path) -> Timeline:
    """Reads a file that `update --trace` has written.

    Raises:
        SettingError: it cannot be read, or is no such file.
    """
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise SettingError(f"{path} is not a trace: {error}; make one with checkpoint-engine update --trace") from error
    spans = [event for event in file.traceEvents if event.ph == "X" and event.cat in LANES]
    if not spans:
        raise SettingError(f"{path} holds no spans of an update; make it with checkpoint-engine update --trace")
    names = {e.pid: str(e.args.get("name", "")) for e in file.traceEvents if e.name == "process_name"}
    return Timeline(file.otherData, names, tuple(_lanes(spans)))


def _lanes(spans: Sequence[_Event]) -> Iterable[Lane]:
    started: dict[Any, float] = defaultdict(float)
    for span in spans:
        if span.cat == "broadcast":
            bucket = span.args.get("bucket")
            started[bucket] = max(started[bucket], span.ts)
    by_lane: dict[tuple[int, int], list[_Event]] = defaultdict(list)
    for span in spans:
        by_lane[span.pid, LANES.index(span.cat)].append(span)
    for (rank, index), events in sorted(by_lane.items()):
        events.sort(key=lambda event: (event.ts, -event.dur))
        yield Lane(rank, LANES[index], tuple(_bars(LANES[index], events, started)))


def _bars(stage: str, events: Sequence[_Event], started: dict[Any, float]) -> Iterable[Bar]:
    outer_end = 0.0
    for event in events:
        end = event.ts + event.dur
        inside = stage == PHASES and end <= outer_end
        outer_end = max(outer_end, end)
        # No rank can send or receive before the last one has come.
        bucket = event.args.get("bucket")
        ready = min(max(event.ts, started[bucket]), end) if stage == "broadcast" else event.ts
        times = (event.ts / 1e6, ready / 1e6, end / 1e6)
        yield Bar(event.name, *times, bucket, int(event.args.get("bytes", 0)), int(inside))


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
