"""Boxes of a tensor: whether some of them make up the whole of it, and what two of them have in common. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BoxFault", "TensorBox", "find_box_fault"]

_KINDS_CHECKED = 1 << 14
"""Ways to cut a tensor whose check is remembered: layers are cut alike."""


class TensorBox(NamedTuple):
    """Elements `begin[i]` to `begin[i] + shape[i]` in every dimension of a tensor."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> TensorBox:
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def end(self) -> tuple[int, ...]:
        """Where it ends in every dimension."""
        return tuple(begin + size for begin, size in zip(self.begin, self.shape, strict=True))

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """As an index of the tensor."""
        return tuple(map(slice, self.begin, self.end))

    def meet(self, other: TensorBox) -> TensorBox | None:
        """What both have; None if there is no such element."""
        begin = tuple(map(max, self.begin, other.begin))
        shape = tuple(min(ends) - first for first, *ends in zip(begin, self.end, other.end, strict=True))
        return TensorBox(begin, shape) if all(size > 0 for size in shape) else None

    def without(self, other: TensorBox) -> list[TensorBox]:
        """What only this one has, in boxes that do not overlap."""
        common = self.meet(other)
        if common is None:
            return [self]
        rest: list[TensorBox] = []
        begin, end = list(self.begin), list(self.end)
        for dimension, (first, last) in enumerate(zip(common.begin, common.end, strict=True)):
            for low, high in ((begin[dimension], first), (last, end[dimension])):
                if low < high:
                    rest.append(_between([*begin], [*end], dimension, low, high))
            begin[dimension], end[dimension] = first, last
        return rest

    def __str__(self) -> str:
        return f"[{', '.join(f'{begin}:{end}' for begin, end in zip(self.begin, self.end, strict=True))}]"


class BoxFault(NamedTuple):
    """What keeps boxes from making up a tensor."""

    kind: str
    """`outside`: a box leaves the tensor. `overlap`: two have elements in common. `hole`: no box has these elements."""
    box: TensorBox
    """The box outside, the common elements, or those that are missing."""
    numbers: tuple[int, ...] = ()
    """Of the boxes at fault."""


@functools.lru_cache(_KINDS_CHECKED)
def find_box_fault(whole: tuple[int, ...], boxes: tuple[TensorBox, ...]) -> BoxFault | None:
    """What keeps `boxes` from having every element of a tensor of this shape exactly once; None if nothing does."""
    for number, box in enumerate(boxes):
        fits = len(box.begin) == len(box.shape) == len(whole)
        if not fits or any(b < 0 or s < 0 or b + s > n for b, s, n in zip(*box, whole, strict=True)):
            return BoxFault("outside", box, (number,))
    overlap = _find_overlap(boxes)
    if overlap is not None:
        return overlap
    if sum(box.elements for box in boxes) == math.prod(whole):
        return None
    rest = [TensorBox.whole(whole)]
    for box in boxes:
        rest = [piece for left in rest for piece in left.without(box)]
    return BoxFault("hole", rest[0])


def _find_overlap(boxes: Sequence[TensorBox]) -> BoxFault | None:
    filled = [number for number, box in enumerate(boxes) if box.elements]
    dimension = _most_cut([boxes[number] for number in filled])
    if dimension is None:  # of tensors without dimensions, every two boxes are the same
        return BoxFault("overlap", boxes[filled[0]], tuple(filled[:2])) if len(filled) > 1 else None
    open_: list[int] = []
    for number in sorted(filled, key=lambda each: boxes[each].begin[dimension]):
        open_ = [other for other in open_ if boxes[other].end[dimension] > boxes[number].begin[dimension]]
        for other in open_:
            common = boxes[number].meet(boxes[other])
            if common is not None:
                return BoxFault("overlap", common, (other, number))
        open_.append(number)
    return None


def _most_cut(boxes: Sequence[TensorBox]) -> int | None:
    """The dimension in which boxes begin at the most places; None without dimensions."""
    places = [len({box.begin[dimension] for box in boxes}) for dimension in range(len(boxes[0].begin) if boxes else 0)]
    return places.index(max(places)) if places else None


def _between(begin: list[int], end: list[int], dimension: int, low: int, high: int) -> TensorBox:
    begin[dimension], end[dimension] = low, high
    return TensorBox(tuple(begin), tuple(last - first for first, last in zip(begin, end, strict=True)))
