"""The byte runs that a GPU needs out of each segment: a reload plan, once it is known where every tensor lies.

A run is a row of bytes, or rows of equal width that lie apart, as one call of a driver copies them. Pure: the columns
of `Runs` are tensors on the CPU, because a hundred thousand runs are too many for a loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch

__all__ = ["Box", "ByteRuns", "CopyLayout", "PlannedCopy", "Run", "Runs", "box_of", "plan_byte_runs"]

_HERE = torch.device("cpu")
"""Engines plan inside a context that makes another device the default."""

_Dimension = tuple[int, int, int]
"""Size, and steps in bytes in the target and in the source."""

_Found = tuple[int, int, int, int, int]
"""Of a copy: its segment, where in it, its target, where in that, and the copy's number."""


class CopyLayout(NamedTuple):
    """How the elements of a copy lie: strides in elements of `item` bytes; the same for thousands of copies."""

    shape: tuple[int, ...]
    source: tuple[int, ...]
    target: tuple[int, ...]
    item: int


class PlannedCopy(NamedTuple):
    """One copy of a reload plan: from byte `source` of a segment to byte `offset` of a target."""

    segment: int
    source: int
    target: int
    """A number that the caller gives it."""
    offset: int
    layout: CopyLayout


class Box(NamedTuple):
    """Rows of `width` bytes, `height` at a time; each of `corners` (offset, source) starts so many of them."""

    width: int
    height: int
    target_pitch: int
    source_pitch: int
    corners: tuple[tuple[int, int], ...]


class Run(NamedTuple):
    """`height` rows of `width` bytes, from byte `source` of a segment to byte `offset` of a target.

    Each row begins `source_pitch` bytes behind the one before it in the segment, and `target_pitch` in the target.
    """

    segment: int
    source: int
    target: int
    offset: int
    width: int
    height: int
    source_pitch: int
    target_pitch: int


@dataclass(frozen=True)
class Runs:
    """Any number of runs by columns, each 1-D int64 on the CPU and as long as the others; see `Run`."""

    segment: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    offset: torch.Tensor
    width: torch.Tensor
    height: torch.Tensor
    source_pitch: torch.Tensor
    target_pitch: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Runs]) -> Runs:
        """One part after the other."""
        return cls(*(torch.cat(columns) for columns in zip(*(part.columns for part in parts), strict=True)))

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """In the order of `Run`."""
        return (
            self.segment,
            self.source,
            self.target,
            self.offset,
            self.width,
            self.height,
            self.source_pitch,
            self.target_pitch,
        )

    def __len__(self) -> int:
        return len(self.segment)

    def __iter__(self) -> Iterator[Run]:
        return map(Run._make, zip(*map(_numbers, self.columns), strict=True))

    def __getitem__(self, chosen: torch.Tensor | slice) -> Runs:
        """Some of them, by number or by a mask."""
        return Runs(*(column[chosen] for column in self.columns))

    def repeated(self, times: torch.Tensor) -> Runs:
        """Each so many times in a row."""
        return Runs(*(column.repeat_interleave(times) for column in self.columns))

    @property
    def nbytes(self) -> torch.Tensor:
        """Of each."""
        return self.width * self.height

    @property
    def last(self) -> torch.Tensor:
        """Where in its segment the last byte of each lies."""
        return self.source + (self.height - 1) * self.source_pitch + self.width - 1


@dataclass(frozen=True)
class ByteRuns:
    """Runs in order of segment and source."""

    runs: Runs
    apart: tuple[int, ...] = ()
    """Numbers of the copies whose elements do not even make rows; they are in no run."""

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return int(self.runs.width.dot(self.runs.height))

    def by_segment(self) -> dict[int, int]:
        """Bytes of the runs out of each segment."""
        segments, nbytes = self.runs.segment, self.runs.nbytes
        return {segment: int(nbytes[segments == segment].sum()) for segment in _distinct(segments)}

    def spans(self, gap: int = 1) -> list[tuple[int, int, int]]:
        """Ranges (segment, start, bytes) that hold all runs; what is less than `gap` bytes apart is taken as one."""
        wide = self.runs.source_pitch - self.runs.width >= gap
        rows = _as_rows(self.runs, (self.runs.height > 1) & wide)
        order = _order(rows.segment, rows.source)
        segments, starts, ends = rows.segment[order], rows.source[order], rows.last[order] + 1
        spans: list[tuple[int, int, int]] = []
        for segment in _distinct(segments):
            mine = segments == segment
            begin, reach = starts[mine], ends[mine].cummax(0).values
            fresh = torch.ones(len(begin), dtype=torch.bool, device=_HERE)
            fresh[1:] = begin[1:] >= reach[:-1] + gap
            first, end = _numbers(begin[fresh]), _numbers(reach[fresh.roll(-1)])
            spans += [(segment, start, stop - start) for start, stop in zip(first, end, strict=True)]
        return spans


def plan_byte_runs(copies: Iterable[PlannedCopy], edge: int | None = None) -> ByteRuns:
    """Plans the runs of one GPU.

    Args:
        copies: What its reload plan copies; none of them writes what another one writes.
        edge: Segments are registered with the GPU in parts of so many bytes, which no copy may cross; None if whole.
    """
    by_layout: dict[CopyLayout, list[_Found]] = {}
    for number, (segment, source, target, offset, layout) in enumerate(copies):
        by_layout.setdefault(layout, []).append((segment, source, target, offset, number))
    parts: list[Runs] = []
    apart: list[int] = []
    for layout, found in by_layout.items():
        box = box_of(layout)
        if box is None:
            apart += [number for *_, number in found]
        else:
            parts.append(_runs_of(found, box))
    runs = Runs.joined(parts or [_runs_of([], Box(0, 0, 0, 0, ()))])
    if len(runs):
        runs = _merged(runs if edge is None else _cut(runs, edge), edge)
    return ByteRuns(runs, tuple(sorted(apart)))


def box_of(layout: CopyLayout) -> Box | None:
    """The rows that make up a copy; None where neighbouring elements are apart on one side."""
    shape, item = layout.shape, layout.item
    steps = [(size, to * item, of * item) for size, of, to in zip(shape, layout.source, layout.target, strict=True)]
    if 0 in shape:
        return Box(0, 0, 0, 0, ())
    dimensions = [step for step in steps if step[0] != 1]
    if not shape or shape[-1] == 1:
        dimensions.append((1, item, item))  # columns are rows of a single element
    *outer, (width, to, of) = _joined(dimensions)
    if (to, of) != (item, item):
        return None
    width *= item
    height, to, of = outer.pop() if outer else (1, width, width)
    if to < width or of < width:  # rows that overlap, such as those of an expanded tensor: one by one
        outer.append((height, to, of))
        height, to, of = 1, width, width
    corners = (
        (
            sum(index * step for index, (_, step, _) in zip(indices, outer, strict=True)),
            sum(index * step for index, (_, _, step) in zip(indices, outer, strict=True)),
        )
        for indices in itertools.product(*(range(size) for size, _, _ in outer))
    )
    return Box(width, height, to, of, tuple(corners))


def _joined(dimensions: Sequence[_Dimension]) -> list[_Dimension]:
    """Makes one of neighbouring dimensions that lie without a gap on both sides."""
    joined: list[_Dimension] = []
    for size, to, of in dimensions:
        if joined and joined[-1][1:] == (size * to, size * of):
            joined[-1] = (joined[-1][0] * size, to, of)
        else:
            joined.append((size, to, of))
    return joined


def _runs_of(found: Sequence[_Found], box: Box) -> Runs:
    """Copies of one layout as runs."""
    corners = torch.tensor(box.corners, dtype=torch.int64, device=_HERE).reshape(-1, 2)
    copies = torch.tensor(found, dtype=torch.int64, device=_HERE).reshape(-1, 5).repeat_interleave(len(corners), 0)
    offsets, sources = corners.repeat(len(found), 1).unbind(1)
    segment, source, target, offset, _ = copies.unbind(1)
    shape = (box.width, box.height, box.source_pitch, box.target_pitch)
    columns = (torch.full_like(segment, number) for number in shape)
    return Runs(segment, source + sources, target, offset + offsets, *columns)


def _as_rows(runs: Runs, chosen: torch.Tensor) -> Runs:
    """Every row of the chosen runs a run of its own."""
    times = torch.where(chosen, runs.height, 1)
    number = _count_up(times)
    rows = runs.repeated(times)
    return replace(
        rows,
        source=rows.source + number * rows.source_pitch,
        offset=rows.offset + number * rows.target_pitch,
        height=torch.where(chosen.repeat_interleave(times), 1, rows.height),
    )


def _cut(runs: Runs, edge: int) -> Runs:
    """Runs of which none crosses a multiple of `edge` bytes of its segment."""
    across = runs.source // edge != runs.last // edge
    rows = _as_rows(runs, (runs.height > 1) & across)
    times = rows.last // edge - rows.source // edge + 1
    number = _count_up(times)
    cut, last = rows.repeated(times), rows.last.repeat_interleave(times)
    border = (cut.source // edge + number) * edge
    begin = torch.where(number > 0, border, cut.source)
    # Rows that lie apart are within one edge: they stay as they are.
    nbytes = torch.minimum(last + 1, border + edge) - begin
    return replace(
        cut,
        source=begin,
        offset=cut.offset + begin - cut.source,
        width=torch.where(cut.height > 1, cut.width, nbytes),
    )


def _merged(runs: Runs, edge: int | None) -> Runs:
    """In order; runs that follow each other on both sides, and not at an edge, are one."""
    runs = runs[_order(runs.segment, runs.target, runs.source - runs.offset, runs.source)]
    follows = (runs.height[:-1] == 1) & (runs.height[1:] == 1)
    for column in (runs.segment, runs.target):
        follows &= column[:-1] == column[1:]
    for column in (runs.source, runs.offset):
        follows &= column[:-1] + runs.width[:-1] == column[1:]
    if edge is not None:
        follows &= runs.source[1:] % edge != 0
    fresh = torch.ones(len(runs), dtype=torch.bool, device=_HERE)
    fresh[1:] = ~follows
    merged = runs[fresh]
    width = torch.zeros_like(merged.width).index_add_(0, fresh.cumsum(0) - 1, runs.width)
    return replace(merged, width=width)[_order(merged.segment, merged.source)]


def _order(*keys: torch.Tensor) -> torch.Tensor:
    """Numbers that sort by the first key, then by the second, and so on."""
    order = torch.arange(len(keys[0]), dtype=torch.int64, device=_HERE)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _count_up(times: torch.Tensor) -> torch.Tensor:
    """0, 1, … up to each number of `times`, one after the other."""
    ends = times.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return torch.arange(total, dtype=torch.int64, device=_HERE) - (ends - times).repeat_interleave(times)


def _distinct(column: torch.Tensor) -> list[int]:
    return sorted(set(_numbers(column)))


def _numbers(column: torch.Tensor) -> list[int]:
    return cast("Any", column).tolist()
