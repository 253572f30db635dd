"""Draws a timeline with matplotlib, one lane for each rank and stage."""

# matplotlib leaves its keyword arguments untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_engine.cli.summary import size
from checkpoint_engine.cli.timeline_data import Bar, Lane, Limit, Timeline
from checkpoint_engine.errors import MissingDependencyError, SettingError
from checkpoint_engine.transfer.trace import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_WIDTH = 12.0
"""Inches, of which the lanes take the share between `_LEFT` and `_RIGHT`."""
_LEFT, _RIGHT = 0.115, 0.845
_LANE, _GAP = 0.3, 0.16
"""Height in inches of a lane, and between ranks."""
_TOP, _BOTTOM = 0.86, 0.78
_DPI = 130

_COLOURS = {
    "read": ("#7b5ea7", "#9a82bf"),
    "copy": ("#2f6db3", "#5b92cd"),
    "broadcast": ("#e08a1e", "#f0aa53"),
    "load": ("#2e8b57", "#5cae7f"),
}
"""Two shades of each stage, so that neighbouring buckets can be told apart."""
_PHASE_COLOURS = ("#c3cad4", "#e1e5eb")
_WAITING = "#f8dfbf"
_INK, _FAINT, _RED = "#22272e", "#6b7480", "#b3261e"
_NAMES = {
    PHASES: "connect / finish",
    "read": "read from other hosts",
    "copy": "copy to the device",
    "broadcast": "broadcast",
    "load": "load in the engine",
}
_SMALL = 6.5
_CHARACTER = 0.0076
"""Inches that a character takes for each point of its size."""


def draw(timeline: Timeline, limit: Limit | None, path: Path, title: str | None = None) -> None:
    """Writes the picture; its format follows from the file's name.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SettingError: the file cannot be written.
    """
    figure = _figure(_height(timeline.lanes))
    axes = figure.add_axes(_frame(figure))
    tops = _tops(timeline.lanes)
    seconds = timeline.seconds
    unit, scale = ("ms", 1000.0) if seconds < 10 else ("s", 1.0)  # noqa: PLR2004
    axes.set_xlim(0, seconds * scale)
    axes.set_ylim(max(tops) + _LANE + _GAP / 2, -_GAP / 2)
    _stripe(axes, timeline, tops)
    for lane, top in zip(timeline.lanes, tops, strict=True):
        _draw_lane(axes, lane, top, scale, seconds)
    if limit is not None and limit.seconds < seconds:
        _draw_limit(axes, limit, scale)
    _label(axes, figure, timeline, limit, unit, title)
    _legend(figure, timeline)
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error.strerror}") from error


def _figure(height: float) -> Figure:
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingDependencyError(
            f"drawing needs matplotlib ({error}): pip install 'checkpoint-engine-core[plot]'"
        ) from error
    return figures.Figure(figsize=(_WIDTH, height), facecolor="white")


def _height(lanes: Sequence[Lane]) -> float:
    return _TOP + _BOTTOM + max(_tops(lanes)) + _LANE + _GAP


def _frame(figure: Figure) -> tuple[float, float, float, float]:
    height = figure.get_figheight()
    return _LEFT, _BOTTOM / height, _RIGHT - _LEFT, 1 - (_TOP + _BOTTOM) / height


def _tops(lanes: Sequence[Lane]) -> list[float]:
    """Where each lane begins, in inches from the top; a gap separates ranks."""
    tops: list[float] = []
    y, rank = 0.0, lanes[0].rank
    for lane in lanes:
        y += _GAP if lane.rank != rank else 0.0
        rank = lane.rank
        tops.append(y)
        y += _LANE
    return tops


def _stripe(axes: Axes, timeline: Timeline, tops: Sequence[float]) -> None:
    """A quiet ground behind each rank's lanes, and its name."""
    for rank in dict.fromkeys(lane.rank for lane in timeline.lanes):
        mine = [top for lane, top in zip(timeline.lanes, tops, strict=True) if lane.rank == rank]
        first, last = min(mine), max(mine) + _LANE
        axes.axhspan(first - 0.03, last + 0.03, color="#f5f6f8", zorder=0, linewidth=0)
        middle, left = (first + last) / 2, axes.get_yaxis_transform()
        axes.text(-0.148, middle, f"rank {rank}", transform=left, va="center", weight="bold", size=10, color=_INK)
    axes.set_yticks([top + _LANE / 2 for top in tops])
    labels = axes.set_yticklabels(["phases" if lane.stage == PHASES else lane.stage for lane in timeline.lanes])
    for label in labels:
        label.set(size=8.5, color=_INK)
    axes.tick_params(axis="y", length=0, pad=6)


def _draw_lane(axes: Axes, lane: Lane, top: float, scale: float, seconds: float) -> None:
    if lane.stage == PHASES:
        for bar in lane.bars:
            _draw_phase(axes, bar, top, scale, seconds)
        return
    height = _LANE - 0.07
    for shade, colour in enumerate(_COLOURS[lane.stage]):
        bars = [bar for index, bar in enumerate(lane.bars) if index % 2 == shade]
        waits = [(bar.begin * scale, (bar.ready - bar.begin) * scale) for bar in bars if bar.ready > bar.begin]
        works = [(bar.ready * scale, (bar.end - bar.ready) * scale) for bar in bars]
        axes.broken_barh(waits, (top + 0.035, height), facecolor=_WAITING, zorder=2, linewidth=0)
        axes.broken_barh(works, (top + 0.035, height), facecolor=colour, zorder=3, linewidth=0)
    for bar in lane.bars:
        if bar.bucket is not None:
            _write(axes, f"{bar.bucket}", bar.ready, bar.end, top + _LANE / 2, scale, seconds, "white")
    right = axes.get_yaxis_transform()
    said = f"{lane.rate / 1e9:.3g} GB/s, busy {lane.busy / seconds:.0%}"
    axes.text(1.008, top + _LANE / 2, said, transform=right, va="center", size=8, color=_FAINT)


def _draw_phase(axes: Axes, bar: Bar, top: float, scale: float, seconds: float) -> None:
    height = (_LANE - 0.04) / 2
    y = top + 0.02 + bar.depth * height
    begin, width = bar.begin * scale, (bar.end - bar.begin) * scale
    axes.broken_barh(
        [(begin, width)],
        (y, height),
        facecolor=_PHASE_COLOURS[bar.depth],
        edgecolor="white",
        linewidth=0.5,
        zorder=5.5,  # above the line of the limit, which would cross their names
    )
    _write(axes, bar.name, bar.begin, bar.end, y + height / 2 + 0.005, scale, seconds, _INK)


def _write(
    axes: Axes, text: str, begin: float, end: float, y: float, scale: float, seconds: float, colour: str
) -> None:
    """Writes into a bar, if there is room."""
    inches = (end - begin) / seconds * _WIDTH * (_RIGHT - _LEFT)
    if (len(text) + 1) * _SMALL * _CHARACTER < inches:
        middle = (begin + end) / 2 * scale
        axes.text(middle, y, text, ha="center", va="center", size=_SMALL, color=colour, zorder=6)


def _draw_limit(axes: Axes, limit: Limit, scale: float) -> None:
    axes.axvline(limit.seconds * scale, color=_RED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=5)
    said = f" limit {limit.seconds * 1000:.3g} ms"
    top = axes.get_xaxis_transform()
    axes.text(limit.seconds * scale, 1.0, said, transform=top, va="bottom", size=8, color=_RED)


def _label(axes: Axes, figure: Figure, timeline: Timeline, limit: Limit | None, unit: str, title: str | None) -> None:
    about, height = timeline.about, figure.get_figheight()
    heading = title or f"Update to {about.get('version', '?')}"
    figure.text(0.012, 1 - 0.24 / height, heading, size=13, weight="bold", color=_INK, va="center")
    figure.text(0.012, 1 - 0.5 / height, " · ".join(_facts(timeline, limit)), size=9, color=_FAINT, va="center")
    axes.set_xlabel(f"{unit} since the update began", size=8.5, color=_INK, labelpad=3)
    axes.tick_params(axis="x", labelsize=8, colors=_INK, length=3)
    axes.grid(axis="x", color="white", linewidth=0.9, zorder=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aab2bd")


def _facts(timeline: Timeline, limit: Limit | None) -> Iterator[str]:
    about = timeline.about
    if nbytes := about.get("bytes"):
        yield f"{size(nbytes)} to {len({lane.rank for lane in timeline.lanes})} ranks in {timeline.seconds:.3g} s"
    if "method" in about:
        yield str(about["method"])
    if limit is not None:
        how = "measured" if limit.measured else "given"
        share = f"{limit.seconds / timeline.seconds:.0%} of the limit"
        yield f"reaches {share} ({size(limit.nbytes)} a rank at {limit.rate / 1e9:.3g} GB/s, {how})"


def _legend(figure: Figure, timeline: Timeline) -> None:
    patches = importlib.import_module("matplotlib.patches")
    stages = list(dict.fromkeys(lane.stage for lane in timeline.lanes))
    entries = [(_NAMES[stage], _COLOURS[stage][0] if stage in _COLOURS else _PHASE_COLOURS[0]) for stage in stages]
    if any(bar.ready > bar.begin for lane in timeline.lanes for bar in lane.bars):
        entries.append(("waits for other ranks", _WAITING))
    handles = [patches.Patch(facecolor=colour, label=name) for name, colour in entries]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(_LEFT - 0.006, 0.0),
        ncol=len(handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        handlelength=1.2,
        handleheight=0.9,
        columnspacing=1.8,
    )
