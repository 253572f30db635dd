"""Tensors that a loader puts side by side, as `cat` and `stack` do: where each place came from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
