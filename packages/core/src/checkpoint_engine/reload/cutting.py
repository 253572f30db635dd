"""Copies out of a tensor that lies in boxes: what a copy takes out of each box. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from checkpoint_engine.boxes import TensorBox
from checkpoint_engine.reload.regions import Region, Shape, contiguous, trace_back

__all__ = ["cut_copy"]

_MOST_PARTS = 1 << 12
"""Copies that one may come apart into, so that a box is met; one that would need more is done out of the whole."""
_REMEMBERED = 1 << 15


class _TooManyPartsError(Exception):
    """A copy is better done out of the whole tensor."""


@functools.lru_cache(_REMEMBERED)
def cut_copy(source: Region, target: Region, whole: Shape, box: TensorBox) -> tuple[tuple[Region, Region], ...] | None:
    """What a copy takes out of one box.

    Args:
        source: Elements of a tensor that lies row-major.
        target: As many elements elsewhere, in the same order.
        whole: Shape of the tensor.
        box: What is there of it, row-major.

    Returns:
        Pairs of regions, of the box and of the target: all elements of the source that the box has. None where they
        make too many regions, or none at all.
    """
    if not source.elements or not box.elements:
        return ()
    everything = Region(0, whole, contiguous(whole))
    traced = trace_back(source, everything, everything)
    if traced is None:
        return None
    source, target = source.refined(traced[0]), target.refined(traced[0])
    first = _digits(source.offset, everything.stride)
    steps = [
        _digits(step if size > 1 else 0, everything.stride)
        for size, step in zip(source.shape, source.stride, strict=True)
    ]
    try:
        return tuple(_cut(_TensorCopy(first, steps, source.shape, target), whole, box))
    except _TooManyPartsError:
        return None


class _TensorCopy:
    """A copy out of a tensor: along each of its dimensions, the index into the tensor goes on by `steps`."""

    def __init__(self, first: Sequence[int], steps: Sequence[Sequence[int]], shape: Shape, target: Region) -> None:
        self.first = tuple(first)
        self.steps = tuple(map(tuple, steps))
        self.shape = shape
        self.target = target

    def sliced(self, dimension: int, begin: int, size: int) -> _TensorCopy:
        """Of one of its dimensions, `size` places from `begin` on."""
        first = [at + begin * step for at, step in zip(self.first, self.steps[dimension], strict=True)]
        shape = (*self.shape[:dimension], size, *self.shape[dimension + 1 :])
        steps = [tuple(0 for _ in step) if n == dimension and size == 1 else step for n, step in enumerate(self.steps)]
        target = self.target
        return _TensorCopy(
            first, steps, shape, Region(target.offset + begin * target.stride[dimension], shape, target.stride)
        )

    def moving(self, along: int) -> list[int]:
        """Its dimensions along which the index in that dimension of the tensor changes, the slowest first."""
        found = [n for n, step in enumerate(self.steps) if step[along] and self.shape[n] > 1]
        return sorted(found, key=lambda n: -self.steps[n][along])

    def within(self, box: TensorBox) -> tuple[Region, Region]:
        """All of it lies in that box: the regions of box and target."""
        strides = contiguous(box.shape)
        offset = sum((at - begin) * s for at, begin, s in zip(self.first, box.begin, strides, strict=True))
        stride = tuple(sum(d * s for d, s in zip(step, strides, strict=True)) for step in self.steps)
        return Region(offset, self.shape, stride), self.target


def _cut(copy: _TensorCopy, whole: Shape, box: TensorBox) -> Iterator[tuple[Region, Region]]:
    """Takes one dimension of the tensor after the other, as far as the box does not have all of it."""
    copies = [copy]
    for along, (begin, end, size) in enumerate(zip(box.begin, box.end, whole, strict=True)):
        if (begin, end) != (0, size):
            copies = [part for each in copies for part in _restricted(each, along, begin, end)]
        if len(copies) > _MOST_PARTS:
            raise _TooManyPartsError
    return (each.within(box) for each in copies)


def _restricted(copy: _TensorCopy, along: int, begin: int, end: int) -> Iterator[_TensorCopy]:
    """What of a copy has its index in one dimension of the tensor from `begin` up to `end`."""
    moving, first = copy.moving(along), copy.first[along]
    if not moving:
        if begin <= first < end:
            yield copy
        return
    if len(moving) > 1:
        slowest = moving[0]
        if copy.shape[slowest] > _MOST_PARTS:
            raise _TooManyPartsError
        for place in range(copy.shape[slowest]):
            yield from _restricted(copy.sliced(slowest, place, 1), along, begin, end)
        return
    step, size = copy.steps[moving[0]][along], copy.shape[moving[0]]
    low, high = max(0, -(-(begin - first) // step)), min(size, -(-(end - first) // step))
    if low < high:
        yield copy.sliced(moving[0], low, high - low)


def _digits(place: int, strides: Shape) -> tuple[int, ...]:
    """The index of an element of a tensor that lies row-major."""
    digits: list[int] = []
    for stride in strides:
        digit, place = divmod(place, stride)
        digits.append(digit)
    return tuple(digits)
