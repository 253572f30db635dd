"""Tensors that a loader puts side by side, as `cat` and `stack` do: where each place came from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from checkpoint_engine.boxes import TensorBox
from checkpoint_engine.reload.cutting import cut_copy
from checkpoint_engine.reload.regions import Region, Shape, Splits, contiguous, trace_back

__all__ = ["JoinedPart", "JoinedTensors", "join"]

_Traced = tuple[str, Splits, Region, torch.dtype]
"""What a tensor shows part of: its name, how to split dimensions, which part, read as what."""


@dataclass(frozen=True)
class JoinedPart:
    """A box of the result, and what was put there."""

    source: str
    dtype: torch.dtype
    region: Region
    """Of the source."""
    box: TensorBox
    held: Region
    """The same elements in the box, which lies row-major."""

    def reordered(self, order: Sequence[int | None], whole: Shape) -> JoinedPart | None:
        """The same where dimensions are in another order: for each its old place; None for one of a single place."""
        size = self.box.shape
        box = TensorBox(
            tuple(0 if at is None else self.box.begin[at] for at in order),
            tuple(1 if at is None else size[at] for at in order),
        )
        steps = {at: step for at, step in zip(order, contiguous(box.shape), strict=True) if at is not None}
        moved = Region(0, size, tuple(steps.get(at, 0) for at in range(len(whole))))
        traced = trace_back(self.held, Region(0, size, contiguous(size)), moved)
        if traced is None:
            return None
        return replace(self, box=box, held=traced[1], region=self.region.refined(traced[0]))


@dataclass(frozen=True)
class JoinedTensors:
    """A result, which lies row-major."""

    shape: Shape
    parts: tuple[JoinedPart, ...]

    @property
    def origins(self) -> frozenset[str]:
        """Of whatever lies there."""
        return frozenset(part.source for part in self.parts)

    def copies(self, view: Region, target: Region) -> list[tuple[JoinedPart, Region, Region]] | None:
        """What a copy of a view of it into a target does: pairs of regions, of sources and target; None if too much."""
        found: list[tuple[JoinedPart, Region, Region]] = []
        for part in self.parts:
            cuts = cut_copy(view, target, self.shape, part.box)
            if cuts is None:
                return None
            for cut, into in cuts:
                traced = trace_back(cut, part.held, part.region)
                if traced is None:
                    return None
                found.append((part, traced[1], into.refined(traced[0])))
        return found

    def copied(self, view: Region, copy: Region) -> JoinedTensors | None:
        """What a copy of all of it is that has its dimensions in another order; None for any other copy.

        Args:
            view: What is copied.
            copy: Where the copy lies in memory of its own.
        """
        whole = Region(0, self.shape, contiguous(self.shape))
        traced = trace_back(view, whole, whole)
        if traced is None or copy != Region(0, copy.shape, contiguous(copy.shape)):
            return None
        order = _order(traced[1], whole)
        if order is None:
            return None
        parts = [part.reordered(order, self.shape) for part in self.parts]
        found = tuple(part for part in parts if part is not None)
        return JoinedTensors(traced[1].shape, found) if len(found) == len(parts) else None


def _order(view: Region, whole: Region) -> list[int | None] | None:
    """Which dimension of `whole` each of a view's is (None: one of a single place), if it shows each of them once."""
    places = {step: at for at, (size, step) in enumerate(zip(whole.shape, whole.stride, strict=True)) if size > 1}
    order = [None if size == 1 else places.get(step) for size, step in zip(view.shape, view.stride, strict=True)]
    shown = [at for at in order if at is not None]
    sizes = [whole.shape[at] if at is not None else 1 for at in order]
    return order if sorted(shown) == sorted(places.values()) and tuple(sizes) == view.shape else None


def join(
    parts: Sequence[tuple[Shape, _Traced | None]], dimension: int, *, stacked: bool, shape: Shape
) -> JoinedTensors | None:
    """What `cat`, or `stack`, of tensors gives; None if one of them cannot be traced.

    Args:
        parts: The shape of each, and what it shows.
        dimension: Along which they are put, of the result.
        stacked: Whether that is a new one.
        shape: Of the result.
    """
    made: list[JoinedPart] = []
    begin = 0
    for own, traced in parts:
        if traced is None:
            return None
        source, splits, region, dtype = traced
        size = 1 if stacked else own[dimension]
        box = TensorBox(
            tuple(begin if at == dimension else 0 for at in range(len(shape))),
            tuple(size if at == dimension else whole for at, whole in enumerate(shape)),
        )
        made.append(JoinedPart(source, dtype, region, box, Region(0, own, contiguous(own)).refined(splits)))
        begin += size
    return JoinedTensors(shape, tuple(made))
