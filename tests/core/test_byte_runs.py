"""Byte runs against copies done tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.planning.byte_runs import ByteRuns, CopyLayout, PlannedCopy, plan_byte_runs

pytestmark = pytest.mark.pure

SEGMENT = 2048
TARGETS = 3


@dataclass(frozen=True)
class Case:
    copies: list[PlannedCopy]
    segments: list[torch.Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tensors side by side in segments; slices of them go to places of their own, in the same or another order."""
    item = draw(st.sampled_from([1, 2, 4]))
    copies: list[PlannedCopy] = []
    used, taken = [0, 0], [0] * TARGETS
    for _ in range(draw(st.integers(0, 12))):
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
        begin = tuple(draw(st.integers(0, size - 1)) for size in shape)
        part = tuple(draw(st.integers(1, size - first)) for size, first in zip(shape, begin, strict=True))
        source = dense(shape)
        segment, target = draw(st.integers(0, 1)), draw(st.integers(0, TARGETS - 1))
        # Into a wider tensor, as a fused parameter is; its dimensions may be turned round, which leaves no rows.
        room = tuple(size + draw(st.integers(0, 2)) for size in part)
        stride = dense(room)
        if draw(st.integers(0, 4)) == 0:
            part, source, stride = part[::-1], source[::-1], dense(room[::-1])
            begin = begin[::-1]
        layout = CopyLayout(part, source, stride, item)
        first = sum(at * step for at, step in zip(begin, source, strict=True)) * item
        copies.append(PlannedCopy(segment, used[segment] + first, target, taken[target], layout))
        used[segment] += size_of(shape) * item + draw(st.sampled_from([0, 0, item]))
        taken[target] += size_of(room) * item
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    segments = [torch.randint(0, 256, (SEGMENT,), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return Case(draw(st.permutations(copies)), segments)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size_of(shape[axis + 1 :]) for axis in range(len(shape)))


def size_of(shape: tuple[int, ...]) -> int:
    return int(torch.tensor(shape, dtype=torch.int64).prod()) if shape else 1


def naively(case: Case, copies: list[PlannedCopy]) -> list[torch.Tensor]:
    """One after the other, as torch copies views."""
    targets = [torch.zeros(2 * SEGMENT, dtype=torch.uint8) for _ in range(TARGETS)]
    for copy in copies:
        shape, of, to, item = copy.layout
        view_of(targets[copy.target], copy.offset, shape, to, item).copy_(
            view_of(case.segments[copy.segment], copy.source, shape, of, item)
        )
    return targets


def view_of(memory: torch.Tensor, at: int, shape: tuple[int, ...], stride: tuple[int, ...], item: int) -> torch.Tensor:
    return memory.as_strided((*shape, item), (*(step * item for step in stride), 1), at)


def by_runs(case: Case, runs: ByteRuns) -> list[torch.Tensor]:
    targets = [torch.zeros(2 * SEGMENT, dtype=torch.uint8) for _ in range(TARGETS)]
    for segment, source, target, place, width, height, of, to in rows(runs):
        for row in range(height):
            begin = source + row * of
            targets[target][place + row * to :][:width] = case.segments[segment][begin : begin + width]
    return targets


def rows(runs: ByteRuns) -> list[list[int]]:
    return [list(run) for run in runs.runs]


@pytest.mark.thorough
@settings(max_examples=50, deadline=None)
@given(case=cases(), edge=st.sampled_from([None, 1, 7, 64, 4096]))
def test_runs_do_what_the_copies_do(case: Case, edge: int | None) -> None:
    runs = plan_byte_runs(case.copies, edge)
    planned = [copy for number, copy in enumerate(case.copies) if number not in runs.apart]
    expected = naively(case, planned)
    assert all(torch.equal(*pair) for pair in zip(by_runs(case, runs), expected, strict=True))
    assert runs.nbytes == sum(size_of(copy.layout.shape) * copy.layout.item for copy in planned)
    assert sum(runs.by_segment().values()) == runs.nbytes
    for number in runs.apart:
        layout = case.copies[number].layout
        assert layout.source[-1] != 1 or layout.target[-1] != 1


@settings(max_examples=25, deadline=None)
@given(case=cases(), edge=st.sampled_from([5, 64, 1000]))
def test_they_are_in_order_within_edges_and_merged(case: Case, edge: int) -> None:
    runs = plan_byte_runs(case.copies, edge)
    listed = rows(runs)
    assert [run[:2] for run in listed] == sorted(run[:2] for run in listed)
    for _, source, _, _, width, height, pitch, _ in listed:
        assert source // edge == (source + (height - 1) * pitch + width - 1) // edge
    flat = {(segment, source, target, place) for segment, source, target, place, _, height, *_ in listed if height == 1}
    for segment, source, target, place, width, height, *_ in listed:
        if height == 1 and (source + width) % edge:
            assert (segment, source + width, target, place + width) not in flat, "two runs that are one"


@settings(max_examples=25, deadline=None)
@given(case=cases(), gap=st.sampled_from([1, 3, 100]))
def test_spans_hold_every_run_and_no_wide_gap(case: Case, gap: int) -> None:
    runs = plan_byte_runs(case.copies)
    needed = [torch.zeros(SEGMENT, dtype=torch.bool) for _ in range(2)]
    for segment, source, _, _, width, height, pitch, _ in rows(runs):
        for row in range(height):
            needed[segment][source + row * pitch :][:width] = True
    spans = runs.spans(gap)
    for segment, start, nbytes in spans:
        inside = needed[segment][start : start + nbytes]
        assert inside[0]
        assert inside[-1]
        assert len(inside) < gap or not (~inside).unfold(0, gap, 1).all(1).any()
        needed[segment][start : start + nbytes] = False
    assert not any(each.any() for each in needed)


def test_a_thousand_experts_side_by_side_are_one_run() -> None:
    layout = CopyLayout((8, 16), (16, 1), (16, 1), 2)
    runs = plan_byte_runs(PlannedCopy(0, 256 * n, 0, 256 * n, layout) for n in reversed(range(1000)))
    assert rows(runs) == [[0, 0, 0, 0, 256_000, 1, 256, 256]]


def test_columns_stay_rows_of_a_pitch() -> None:
    runs = plan_byte_runs([PlannedCopy(3, 64, 1, 0, CopyLayout((1000, 8), (16, 1), (8, 1), 2))])
    assert rows(runs) == [[3, 64, 1, 0, 16, 1000, 32, 16]]
    assert runs.spans() == [(3, 64 + 32 * row, 16) for row in range(1000)]
    assert runs.spans(17) == [(3, 64, 31_984)]


def test_nothing() -> None:
    runs = plan_byte_runs([], 64)
    assert len(runs) == runs.nbytes == 0
    assert runs.by_segment() == {}
    assert runs.spans() == []


def test_a_tensor_without_elements() -> None:
    assert len(plan_byte_runs([PlannedCopy(0, 0, 0, 0, CopyLayout((0, 3), (3, 1), (3, 1), 2))])) == 0
