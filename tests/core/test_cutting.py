"""Copies out of boxes, against copies out of the whole tensor; replayed plans too."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.boxes import TensorBox
from checkpoint_engine.reload.cutting import cut_copy
from checkpoint_engine.reload.regions import Region, contiguous

pytestmark = pytest.mark.pure


@st.composite
def mesh_of(draw: st.DrawFn, shape: tuple[int, ...]) -> list[TensorBox]:
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    spans = [list(itertools.pairwise(each)) for each in edges]
    return [TensorBox(tuple(b for b, _ in s), tuple(e - b for b, e in s)) for s in itertools.product(*spans)]


@st.composite
def views(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """What loaders do to tensors: slices, transpositions, other shapes, single indices."""
    view = tensor
    for _ in range(draw(st.integers(0, 4))):
        if not view.dim() or not view.numel():
            break
        dimension = draw(st.integers(0, view.dim() - 1))
        size = view.shape[dimension]
        kind = draw(st.sampled_from(["narrow", "step", "transpose", "split", "flatten", "index"]))
        if kind == "narrow":
            begin = draw(st.integers(0, size - 1))
            view = view.narrow(dimension, begin, draw(st.integers(1, size - begin)))
        elif kind == "step":
            slices = [slice(None)] * view.dim()
            slices[dimension] = slice(draw(st.integers(0, size - 1)), None, draw(st.integers(1, 3)))
            view = view[tuple(slices)]
        elif kind == "transpose":
            view = view.transpose(dimension, draw(st.integers(0, view.dim() - 1)))
        elif kind == "split":
            inner = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            view = view.unflatten(dimension, (size // inner, inner))
        elif kind == "flatten" and view.is_contiguous():
            view = view.reshape(-1)
        elif kind == "index":
            view = view.select(dimension, draw(st.integers(0, size - 1)))
    return view


@settings(max_examples=400, deadline=None)
@given(st.data(), st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3).map(tuple), st.booleans())
def test_copies_out_of_boxes_are_the_copy_out_of_the_whole(
    data: st.DataObject, shape: tuple[int, ...], transposed: bool
) -> None:
    whole = torch.arange(1, torch.Size(shape).numel() + 1).view(shape)
    view = data.draw(views(whole))
    memory = torch.zeros(view.numel() + 3, dtype=torch.int64)
    target = Region(3, tuple(view.shape), contiguous(view.shape))
    if transposed and view.dim() > 1:
        target = Region.of(memory[3:].view(view.T.shape if view.dim() == 2 else view.mT.shape).mT)
    read = 0
    for box in data.draw(mesh_of(shape)):
        parts = cut_copy(Region.of(view), target, shape, box)
        if parts is None:
            return  # it is copied out of the whole tensor then
        held = whole[box.slices].contiguous()
        for source, into in parts:
            into.view(memory).copy_(source.view(held))
            read += source.elements
    assert torch.equal(target.view(memory), view)
    assert read == view.numel()
    assert not memory[:3].any()


@pytest.mark.parametrize("box", [TensorBox((0, 3), (6, 2)), TensorBox((1, 0), (3, 8)), TensorBox((5, 7), (1, 1))])
def test_a_worker_that_keeps_half_the_columns_takes_what_a_box_has_of_them(box: TensorBox) -> None:
    whole = torch.arange(48).view(6, 8)
    (parts,) = [cut_copy(Region.of(whole[:, 4:]), Region(0, (6, 4), (4, 1)), (6, 8), box)]
    common = box.meet(TensorBox((0, 4), (6, 4)))
    assert parts is not None
    assert sum(source.elements for source, _ in parts) == (0 if common is None else common.elements)
    assert len(parts) <= 1
