"""The rows that a copy to a GPU is made of, tried with plain memory."""

from __future__ import annotations

import ctypes

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.device.host_copies import rows_of


def copied(target: torch.Tensor, source: torch.Tensor) -> int:
    """Copies row by row; gives the number of calls that the driver would get."""
    rows = rows_of(target, source)
    assert rows is not None
    calls = 0
    for piece in rows:
        calls += 1
        for row in range(piece.height):
            ctypes.memmove(
                piece.target + row * piece.target_pitch, piece.source + row * piece.source_pitch, piece.width
            )
    return calls


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slices_arrive(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    source = torch.arange(5**4 * 16, dtype=torch.int16)[: 2 ** len(shape) * int(torch.tensor(shape).prod())]
    source = source.reshape([2 * size for size in shape])
    target = torch.full([size + 3 for size in shape], -1, dtype=torch.int16)
    to = tuple(slice(1, 1 + size) for size in shape)
    of = tuple(slice(size // 2, size // 2 + size) for size in shape)
    copied(target[to], source[of])
    expected = torch.full_like(target, -1)
    expected[to] = source[of]
    assert torch.equal(target, expected)


def test_as_few_calls_as_possible() -> None:
    source, target = torch.arange(4096).reshape(8, 8, 64), torch.zeros(8, 8, 64, dtype=torch.int64)
    assert copied(target, source) == 1
    assert torch.equal(target, source)
    half = torch.zeros(8, 8, 32, dtype=torch.int64)
    assert copied(half, source[:, :, 32:]) == 1, "64 rows, equally far apart on both sides"
    assert torch.equal(half, source[:, :, 32:])
    assert copied(half[:, :4], source[:, 4:, :32]) == 8, "eight blocks of four rows"


def test_one_row_for_many() -> None:
    target = torch.zeros(3, 4)
    copied(target, torch.arange(4.0).expand(3, 4))
    assert torch.equal(target, torch.arange(4.0).expand(3, 4))


def test_elements_that_are_apart_are_left_to_torch() -> None:
    assert rows_of(torch.zeros(4, 3), torch.zeros(3, 4).t()) is None
    assert rows_of(torch.zeros(4), torch.zeros(8)[::2]) is None


def test_nothing_and_a_single_element() -> None:
    assert copied(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    target = torch.zeros(())
    assert copied(target, torch.tensor(5.0)) == 1
    assert target == 5
