"""The byte runs that a GPU needs out of each segment: a reload plan, once it is known where every tensor lies.

A run is a row of bytes, or rows of equal width that lie apart, as one call of a driver copies them. Pure: the columns
are tensors on the CPU, because a hundred thousand runs are too many for a loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

_HERE = torch.device("cpu")
"""Engines plan inside a context that makes another device the default."""

_SEGMENT, _SOURCE, _TARGET, _PLACE, _WIDTH, _HEIGHT, _SOURCE_PITCH, _PLACE_PITCH = range(8)

_Dimension = tuple[int, int, int]
"""Size, and steps in bytes in the target and in the source."""


class Layout(NamedTuple):
    """How the elements of a copy lie: strides in elements of `item` bytes; the same for thousands of copies."""

    shape: tuple[int, ...]
    source: tuple[int, ...]
    target: tuple[int, ...]
    item: int


class Copy(NamedTuple):
    """One copy of a reload plan: from byte `source` of a segment to byte `place` of a target."""

    segment: int
    source: int
    target: int
    """A number that the caller gives it."""
    place: int
    layout: Layout


class Box(NamedTuple):
    """Rows of `width` bytes, `height` at a time; each of `corners` (place, source) starts so many of them."""

    width: int
    height: int
    place_pitch: int
    source_pitch: int
    corners: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ByteRuns:
    """Runs in order of segment and source."""

    table: torch.Tensor
    """int64, (runs, 8): segment, source, target, place, width, height, pitch in the source, pitch in the target."""
    apart: tuple[int, ...] = ()
    """Numbers of the copies whose elements do not even make rows; they are in no run."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return int(self.table[:, _WIDTH].dot(self.table[:, _HEIGHT]))

    def by_segment(self) -> dict[int, int]:
        """Bytes of the runs out of each segment."""
        segments = self.table[:, _SEGMENT]
        nbytes = self.table[:, _WIDTH] * self.table[:, _HEIGHT]
        return {segment: int(nbytes[segments == segment].sum()) for segment in _distinct(segments)}

    def spans(self, gap: int = 1) -> list[tuple[int, int, int]]:
        """Ranges (segment, start, bytes) that hold all runs; what is less than `gap` bytes apart is taken as one."""
        wide = self.table[:, _SOURCE_PITCH] - self.table[:, _WIDTH] >= gap
        rows = _as_rows(self.table, (self.table[:, _HEIGHT] > 1) & wide)
        rows = rows[_order(rows[:, _SEGMENT], rows[:, _SOURCE])]
        starts, ends = rows[:, _SOURCE], _last_bytes(rows) + 1
        spans: list[tuple[int, int, int]] = []
        for segment in _distinct(rows[:, _SEGMENT]):
            mine = rows[:, _SEGMENT] == segment
            begin, reach = starts[mine], ends[mine].cummax(0).values
            fresh = torch.ones(len(begin), dtype=torch.bool, device=_HERE)
            fresh[1:] = begin[1:] >= reach[:-1] + gap
            first, end = _numbers(begin[fresh]), _numbers(reach[fresh.roll(-1)])
            spans += [(segment, start, stop - start) for start, stop in zip(first, end, strict=True)]
        return spans


def plan_byte_runs(copies: Iterable[Copy], edge: int | None = None) -> ByteRuns:
    """Plans the runs of one GPU.

    Args:
        copies: What its reload plan copies; none of them writes what another one writes.
        edge: Segments are registered with the GPU in parts of so many bytes, which no copy may cross; None if whole.
    """
    by_layout: dict[Layout, list[tuple[int, int, int, int, int]]] = {}
    for number, (segment, source, target, place, layout) in enumerate(copies):
        by_layout.setdefault(layout, []).append((segment, source, target, place, number))
    tables = [torch.empty((0, 8), dtype=torch.int64, device=_HERE)]
    apart: list[int] = []
    for layout, found in by_layout.items():
        box = box_of(layout)
        if box is None:
            apart += [number for *_, number in found]
        else:
            tables.append(_table(torch.tensor(found, dtype=torch.int64, device=_HERE), box))
    table = torch.cat(tables)
    if not len(table):
        return ByteRuns(table, tuple(sorted(apart)))
    return ByteRuns(_merged(table if edge is None else _cut(table, edge), edge), tuple(sorted(apart)))


def box_of(layout: Layout) -> Box | None:
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
            sum(index * step for index, (_, step, _) in zip(place, outer, strict=True)),
            sum(index * step for index, (_, _, step) in zip(place, outer, strict=True)),
        )
        for place in itertools.product(*(range(size) for size, _, _ in outer))
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


def _table(found: torch.Tensor, box: Box) -> torch.Tensor:
    """Copies (n, 5) of one layout as runs."""
    corners = torch.tensor(box.corners, dtype=torch.int64, device=_HERE).reshape(-1, 2)
    shape = torch.tensor([box.width, box.height, box.source_pitch, box.place_pitch], dtype=torch.int64, device=_HERE)
    runs = torch.cat((found[:, :4], shape.expand(len(found), 4)), 1).repeat_interleave(len(corners), 0)
    corners = corners.repeat(len(found), 1)
    runs[:, _PLACE] += corners[:, 0]
    runs[:, _SOURCE] += corners[:, 1]
    return runs


def _last_bytes(table: torch.Tensor) -> torch.Tensor:
    """Where in its segment the last byte of each run lies."""
    return table[:, _SOURCE] + (table[:, _HEIGHT] - 1) * table[:, _SOURCE_PITCH] + table[:, _WIDTH] - 1


def _as_rows(table: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Every row of the chosen runs a run of its own."""
    times = torch.where(chosen, table[:, _HEIGHT], 1)
    number = _count_up(times)
    rows = table.repeat_interleave(times, 0)
    rows[:, _SOURCE] += number * rows[:, _SOURCE_PITCH]
    rows[:, _PLACE] += number * rows[:, _PLACE_PITCH]
    rows[:, _HEIGHT][chosen.repeat_interleave(times)] = 1
    return rows


def _cut(table: torch.Tensor, edge: int) -> torch.Tensor:
    """Runs of which none crosses a multiple of `edge` bytes of its segment."""
    across = table[:, _SOURCE] // edge != _last_bytes(table) // edge
    rows = _as_rows(table, (table[:, _HEIGHT] > 1) & across)
    source, last = rows[:, _SOURCE], _last_bytes(rows)
    times = last // edge - source // edge + 1
    number = _count_up(times)
    cut = rows.repeat_interleave(times, 0)
    source, last = source.repeat_interleave(times), last.repeat_interleave(times)
    border = (source // edge + number) * edge
    begin = torch.where(number > 0, border, source)
    cut[:, _SOURCE] = begin
    cut[:, _PLACE] += begin - source
    # Rows that lie apart are within one edge: they stay as they are.
    nbytes = torch.minimum(last + 1, border + edge) - begin
    cut[:, _WIDTH] = torch.where(cut[:, _HEIGHT] > 1, cut[:, _WIDTH], nbytes)
    return cut


def _merged(table: torch.Tensor, edge: int | None) -> torch.Tensor:
    """In order; runs that follow each other on both sides, and not at an edge, are one."""
    segment, source, target, place = (table[:, column] for column in (_SEGMENT, _SOURCE, _TARGET, _PLACE))
    table = table[_order(segment, target, source - place, source)]
    before, after = table[:-1], table[1:]
    follows = (before[:, _HEIGHT] == 1) & (after[:, _HEIGHT] == 1)
    for column in (_SEGMENT, _TARGET):
        follows &= before[:, column] == after[:, column]
    for column in (_SOURCE, _PLACE):
        follows &= before[:, column] + before[:, _WIDTH] == after[:, column]
    if edge is not None:
        follows &= after[:, _SOURCE] % edge != 0
    fresh = torch.ones(len(table), dtype=torch.bool, device=_HERE)
    fresh[1:] = ~follows
    merged = table[fresh]
    merged[:, _WIDTH] = torch.zeros_like(merged[:, _WIDTH]).index_add_(0, fresh.cumsum(0) - 1, table[:, _WIDTH])
    return merged[_order(merged[:, _SEGMENT], merged[:, _SOURCE])]


def _order(*keys: torch.Tensor) -> torch.Tensor:
    """Places that sort by the first key, then by the second, and so on."""
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
