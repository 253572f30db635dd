"""Strided pieces of memory, and what becomes of them when views are taken of copies of views. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import torch

__all__ = ["Region", "Shape", "Splits", "contiguous", "find_flaws", "trace_back"]

Shape = tuple[int, ...]

Splits = tuple[tuple[int, int], ...]
"""Dimensions to be cut in two, one after the other: (dimension, size of its inner part)."""

_Radix = Sequence[tuple[int, int, int]]
"""For each dimension of a copy, outermost first: its step there, its size, and its step in the source."""

_LARGEST_COVER = 1 << 26
"""Runs of elements that `find_flaws` is ready to sort; a parameter in more pieces than that is not checked."""


_HERE = torch.device("cpu")
"""Engines plan inside a context that makes another device the default."""


class Region(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Elements of a block of memory: `offset + sum(index[i] * stride[i])` for every index within `shape`."""

    offset: int
    shape: Shape
    stride: Shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Region:
        """Where a tensor's elements lie in its storage."""
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    def moved(self, by: int) -> Region:
        """The same, `by` elements further on."""
        return Region(self.offset + by, self.shape, self.stride)

    def expanded(self, shape: Sequence[int]) -> Region:
        """Broadcast to `shape`, as a copy of one into the other does."""
        missing = len(shape) - len(self.shape)
        stride = [0] * missing + [0 if size == 1 else step for size, step in zip(self.shape, self.stride, strict=True)]
        return Region(self.offset, tuple(shape), tuple(stride))

    def split(self, dimension: int, inner: int) -> Region:
        """The same elements in the same order, with one dimension cut into two, the second of size `inner`."""
        size, step = self.shape[dimension], self.stride[dimension]
        shape = (*self.shape[:dimension], size // inner, inner, *self.shape[dimension + 1 :])
        stride = (*self.stride[:dimension], step * inner, step, *self.stride[dimension + 1 :])
        return Region(self.offset, shape, stride)

    def refined(self, splits: Splits) -> Region:
        """All of `splits` done."""
        region = self
        for dimension, inner in splits:
            region = region.split(dimension, inner)
        return region

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """This region of a tensor's storage, counted from the tensor's own first element."""
        return memory.as_strided(self.shape, self.stride, int(memory.storage_offset()) + self.offset)

    def starts(self) -> tuple[torch.Tensor, int]:
        """The first elements (1-D int64) of its contiguous runs, and how long each run is."""
        dimensions = sorted((step, size) for size, step in zip(self.shape, self.stride, strict=True) if size != 1)
        run, outer = 1, list[tuple[int, int]]()
        for step, size in dimensions:
            if step == run and not outer:
                run *= size
            else:
                outer.append((step, size))
        starts = torch.tensor([self.offset], dtype=torch.int64, device=_HERE)
        for step, size in outer:
            starts = (
                starts.unsqueeze(0) + torch.arange(size, dtype=torch.int64, device=_HERE).unsqueeze(1) * step
            ).flatten()
        return starts, run

    def runs(self) -> int:
        """How many contiguous runs it has, at most: what `starts` would have to list."""
        run, count = 1, 1
        for step, size in sorted((step, size) for size, step in zip(self.shape, self.stride, strict=True) if size != 1):
            if step == run and count == 1:
                run *= size
            else:
                count *= size
        return count


def contiguous(shape: Sequence[int]) -> Shape:
    """Strides of a tensor of this shape whose elements lie one after the other."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def trace_back(view: Region, copy: Region, source: Region) -> tuple[Splits, Region] | None:
    """Where the elements of a view come from, if the view is of a copy.

    Args:
        view: A region of the memory that the copy lies in.
        copy: Where the copy lies in its memory; dense, and of the same shape as `source`.
        source: What was copied.

    Returns:
        How the view's dimensions must be split, and then the elements of the source in the view's order; None where
        no strided region has them all.
    """
    # The place of an element of the copy is a number in a mixed radix: one digit for each dimension of the copy.
    dimensions = zip(copy.shape, copy.stride, source.stride, strict=True)
    radix = sorted(((step, size, origin) for size, step, origin in dimensions if size != 1), reverse=True)
    first = _digits(view.offset - copy.offset, radix)
    if first is None or view.elements == 0:
        return None
    splits: list[tuple[int, int]] = []
    while True:  # every round makes a dimension smaller
        digits = [_digits(step if size > 1 else 0, radix) for size, step in zip(view.shape, view.stride, strict=True)]
        if any(step is None for step in digits):
            return None
        steps = [step for step in digits if step is not None]
        place = _first_carry(view.shape, steps, first, radix)
        if place is None:
            offset = source.offset + _along(first, radix)
            return tuple(splits), Region(offset, view.shape, tuple(_along(step, radix) for step in steps))
        split = _split_at_carry(view.shape, steps, place, radix)
        if split is None:
            return None
        splits.append(split)
        view = view.split(*split)


def find_flaws(whole: Region, pieces: Iterable[Region]) -> str:
    """Says what keeps `pieces` from covering `whole` exactly once each element; empty if nothing does."""
    pieces = [piece for piece in pieces if piece.elements]
    elements = sum(piece.elements for piece in pieces)
    if elements < whole.elements:
        return f"{elements} of {whole.elements} elements"
    if elements > whole.elements:
        return f"{elements - whole.elements} elements written twice"
    if not elements:
        return ""
    if sum(piece.runs() for piece in pieces) + whole.runs() > _LARGEST_COVER:
        return "written in too many small pieces to be checked"
    return "" if torch.equal(_union(pieces), _union([whole])) else "some elements written twice, others not at all"


def _union(regions: Iterable[Region]) -> torch.Tensor:
    """Ascending (begin, end) of the contiguous runs, merged; runs that overlap are kept apart."""
    single: list[tuple[int, int]] = []
    begins_of: list[torch.Tensor] = []
    ends_of: list[torch.Tensor] = []
    for region in regions:
        if region.runs() == 1:
            single.append((region.offset, region.offset + region.elements))
            continue
        starts, run = region.starts()
        begins_of.append(starts)
        ends_of.append(starts + run)
    alone = torch.tensor(single, dtype=torch.int64, device=_HERE).reshape(-1, 2)
    begins, order = torch.cat((*begins_of, alone[:, 0])).sort()
    ends = torch.cat((*ends_of, alone[:, 1]))[order]
    fresh = begins[1:] != ends[:-1]
    edge = torch.ones(1, dtype=torch.bool, device=_HERE)
    return torch.stack((begins[torch.cat((edge, fresh))], ends[torch.cat((fresh, edge))]))


def _digits(place: int, radix: _Radix) -> list[int] | None:
    """A distance in the copy, as a number in its radix."""
    digits: list[int] = []
    for step, size, _ in radix:
        digit, place = divmod(place, step)
        if not 0 <= digit < size:
            return None
        digits.append(digit)
    return digits if place == 0 else None


def _first_carry(shape: Shape, digits: Sequence[Sequence[int]], first: Sequence[int], radix: _Radix) -> int | None:
    """The lowest place of the radix at which counting through the view would carry."""
    for place in reversed(range(len(radix))):
        largest = first[place] + sum(step[place] * (size - 1) for step, size in zip(digits, shape, strict=True))
        if largest >= radix[place][1]:
            return place
    return None


def _split_at_carry(shape: Shape, digits: Sequence[Sequence[int]], place: int, radix: _Radix) -> tuple[int, int] | None:
    """Cuts the dimension that carries, so that its inner part does not."""
    for dimension, (size, step) in enumerate(zip(shape, digits, strict=True)):
        if size > 1 and step[place] and radix[place][1] % step[place] == 0:
            inner = radix[place][1] // step[place]
            if 1 < inner < size and size % inner == 0:
                return dimension, inner
    return None


def _along(digits: Sequence[int], radix: _Radix) -> int:
    """Distance in the source that belongs to a distance in the copy."""
    return sum(digit * origin for digit, (_, _, origin) in zip(digits, radix, strict=True))
