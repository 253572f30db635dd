"""Boxes of tensors, against plain counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.boxes import TensorBox, find_box_fault

pytestmark = pytest.mark.pure

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorBox:
    begin = tuple(draw(st.integers(0, size)) for size in shape)
    return TensorBox(begin, tuple(draw(st.integers(0, size - b)) for size, b in zip(shape, begin, strict=True)))


@st.composite
def cuts_of(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[TensorBox, ...]:
    """Cuts every dimension somewhere, as a mesh does."""
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    spans = [list(itertools.pairwise(each)) for each in edges]
    return tuple(
        TensorBox(tuple(b for b, _ in span), tuple(e - b for b, e in span)) for span in itertools.product(*spans)
    )


def count(shape: tuple[int, ...], boxes: tuple[TensorBox, ...]) -> torch.Tensor:
    times = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        times[box.slices] += 1
    return times


@settings(max_examples=150, deadline=None)
@given(st.data(), SHAPES)
def test_a_fault_is_found_exactly_where_an_element_is_not_held_once(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    boxes = tuple(data.draw(st.lists(boxes_in(shape), max_size=5)))
    times, fault = count(shape, boxes), find_box_fault(shape, boxes)
    if fault is None:
        assert bool((times == 1).all())
    elif fault.kind == "hole":
        assert fault.box.elements
        assert bool((times[fault.box.slices] == 0).all())
    else:
        assert fault.kind == "overlap"
        assert bool((times[fault.box.slices] > 1).all())
        one, other = (boxes[number] for number in fault.numbers)
        assert one.meet(other) == fault.box


@settings(max_examples=100, deadline=None)
@given(st.data(), SHAPES)
def test_a_mesh_has_no_fault_and_one_without_a_box_has(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(cuts_of(shape).flatmap(st.permutations).map(tuple))
    assert find_box_fault(shape, boxes) is None
    fault = find_box_fault(shape, boxes[1:])
    assert fault is not None
    assert (fault.kind, fault.box.elements > 0) == ("hole", True)
    twice = find_box_fault(shape, (*boxes, boxes[0]))
    assert twice is not None
    assert (twice.kind, twice.box) == ("overlap", boxes[0])


@settings(max_examples=100, deadline=None)
@given(st.data(), SHAPES)
def test_what_is_left_of_a_box_and_what_two_have_in_common(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common, rest = one.meet(other), one.without(other)
    expected = count(shape, (one,)) * count(shape, (other,))
    assert torch.equal(count(shape, () if common is None else (common,)), expected)
    assert torch.equal(count(shape, tuple(rest)), count(shape, (one,)) - expected)


@pytest.mark.parametrize("box", [TensorBox((3,), (2,)), TensorBox((-1,), (2,)), TensorBox((0, 0), (1, 1))])
def test_a_box_that_leaves_its_tensor(box: TensorBox) -> None:
    assert find_box_fault((4,), (box,)) == ("outside", box, (0,))


def test_a_box_is_named_as_an_index() -> None:
    assert str(TensorBox((0, 4), (2, 3))) == "[0:2, 4:7]"
