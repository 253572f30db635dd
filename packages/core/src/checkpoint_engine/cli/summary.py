"""Shows how an update goes, and afterwards where its time went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from checkpoint_engine.cli.messages import Done, Logged, Progressed
from checkpoint_engine.contract.figures import UpdateFigures
from checkpoint_engine.contract.phase import Phase

__all__ = ["UpdateView", "print_stages", "size", "slowest"]

_GB = 1e9
_SILENCE = 5.0
"""After so many seconds without a line, where there is no terminal, bytes are told that have moved since."""
_UNTIMED = 0.0005
"""A stage that shows as 0.000 s has no rate."""
_PHASES = {
    Phase.START: "starting the ranks",
    Phase.ENGINE: "waiting for the engine",
    Phase.READ: "reading the files",
    Phase.GATHER: "exchanging catalogs",
    Phase.INTRODUCE: "meeting the other ranks",
    Phase.CONNECT: "the engine's workers check what comes",
    Phase.LOAD: "sending",
    Phase.FINISH: "finishing",
}
_STAGES = {
    "engine": ("engine ready", False),
    "read": ("files to host memory", True),
    "gather": ("exchange catalogs", False),
    "connect": ("connect to the engine", False),
    "fetch": ("other hosts' memory to this one's", True),
    "copy": ("host memory to device", True),
    "broadcast": ("broadcast", True),
    "load": ("load into parameters", True),
    "finish": ("finish and resume", False),
    "paused": ("engine paused", False),
    "total": ("update in all", True),
}
"""Stage -> what people call it, and whether it moves bytes."""


class _Moved(DownloadColumn):
    """Bytes, in the phases that move any."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Speed(TransferSpeedColumn):
    """Speed, in the phases that move bytes."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class UpdateView:
    """A progress bar on a terminal; lines elsewhere. Call it with what the ranks report."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Moved(),
            _Speed(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task(_PHASES[Phase.START], total=None)
        self._phase = Phase.START
        self._said = 0.0
        self._warnings: set[str] = set()

    def __call__(self, event: Progressed | Logged) -> None:
        """Shows it."""
        if isinstance(event, Logged):
            self._warn(event.message)
            return
        if event.phase != self._phase and event.phase in _PHASES:
            self._phase = event.phase
            if not self._live:
                self._say()
        elif not self._live and event.bytes_done and time.monotonic() - self._said > _SILENCE:
            self._say(f"{size(event.bytes_done)} of {size(event.nbytes)}")
        self._progress.update(
            self._task,
            description=_PHASES.get(event.phase, event.phase.value),
            completed=event.bytes_done,
            total=event.nbytes or None,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        if not self._live:
            self._say()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _say(self, more: str = "") -> None:
        self._said = time.monotonic()
        self._console.print(f"{_PHASES[self._phase]} … {more}".rstrip(), style="dim")

    def _warn(self, message: str) -> None:
        """Ranks often warn of the same; once is enough."""
        if message not in self._warnings:
            self._warnings.add(message)
            self._console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def slowest(reports: Sequence[Done]) -> dict[str, float]:
    """Seconds of each stage on the rank where it took longest."""
    seconds: dict[str, float] = {}
    for report in reports:
        for stage, value in report.seconds.items():
            seconds[stage] = max(value, seconds.get(stage, 0.0))
    return {stage: seconds[stage] for stage in _STAGES if stage in seconds}


def print_stages(console: Console, reports: Sequence[Done]) -> None:
    """Prints time and GB/s of each stage, all ranks together, and what was moved."""
    first = reports[0].update
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("GB/s", justify="right")
    for stage, seconds in slowest(reports).items():
        label, moves = _STAGES[stage]
        rate = f"{first.nbytes / seconds / _GB:.2f}" if moves and seconds >= _UNTIMED else ""
        table.add_row(label, f"{seconds:.3f} s", rate, style="bold" if stage == "total" else None)
    console.print(table)
    console.print(
        f"{size(first.nbytes)} in {first.tensors} tensors and {first.buckets} buckets of at most "
        f"{size(first.bucket_size)}; staging {first.staging}"
        f"{f', {size(first.staging_kept)} kept for the next update' if first.staging_kept else ''}\n",
        style="dim",
        soft_wrap=True,
    )
    figures = [report.update.figures for report in reports]
    if figures[0].reload:
        console.print(Text(_way_taken(figures), style="dim"), soft_wrap=True)
    said = _other_figures(figures)
    if said:
        console.print(Text(f"each worker of the engine: {said}\n", style="dim"), soft_wrap=True)


def _way_taken(figures: Sequence[UpdateFigures]) -> str:
    """How the tensors got from the buckets into the engine."""
    way, why = _range([one.reload for one in figures]), _range([one.loader_reason for one in figures])
    by_plan, by_loader = (_range([one.plan_bytes for one in figures]), _range([one.loader_bytes for one in figures]))
    says = {
        "plan": f"taken over by reload plan: {by_plan} bytes a worker; by the engine's own loader: {by_loader}",
        "proof": "taken over by the engine's own loader, which proved the reload plan; the next update goes by plan",
        "loader": "taken over by the engine's own loader",
    }
    return says.get(way, f"taken over by {way}") + (f" ({why})" if why and way != "proof" else "")


def _other_figures(figures: Sequence[UpdateFigures]) -> str:
    """What the engines' workers tell of themselves besides; a range where they differ."""
    told = {"reload", "plan_bytes", "loader_bytes", "loader_reason"}
    values: dict[str, list[str | int | float]] = {}
    for one in figures:
        for key, value in one.details().items():
            if key not in told:
                values.setdefault(key, []).append(value)
    return ", ".join(f"{key.replace('_', ' ')} {_range(found)}" for key, found in values.items())


def _range(values: Sequence[str | int | float]) -> str:
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) == len(values):
        low, high = _number(min(numbers)), _number(max(numbers))
        return low if low == high else f"{low} to {high}"
    return " or ".join(dict.fromkeys(map(str, values)))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def size(nbytes: int) -> str:
    """Bytes as people write them."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:  # noqa: PLR2004
            return f"{value:.3g} {unit}" if unit != "bytes" else f"{nbytes} bytes"
        value /= 1000
    return f"{value:.3g} TB"
