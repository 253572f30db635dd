"""How a trainer's tensors were laid out in the step before: mostly as in this one, and there are thousands."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from checkpoint_engine.catalog import ShardPlace
from checkpoint_engine.source.shards import LocalTensors, NamedTensors, is_distributed, local_tensors

__all__ = ["GivenBefore"]

_PART = operator.attrgetter("_local_tensor")
"""What `to_local` gives without a graph, at a tenth of its cost: of those for which that was seen to be so."""
_LAYOUT = operator.attrgetter("_spec")
"""Mesh, placements and shape of the whole: mostly the very object of the step before, also of what `detach` makes."""
_PLACEMENTS = operator.attrgetter("placements")
_SHAPE = operator.attrgetter("shape")


@dataclass(frozen=True)
class _Given:
    """A column for each thing that is compared: by columns that takes a third of the time."""

    names: list[str]
    kinds: list[type]
    layouts: list[object]
    """Of the DTensors."""
    placements: list[object]
    """In these, lest somebody writes to one."""
    shapes: list[torch.Size]
    """Of what this rank has."""
    labels: list[str]
    """What that is called; empty if it is nothing."""


class GivenBefore:
    """Of one checkpoint."""

    def __init__(self) -> None:
        self._given: _Given | None = None
        """None if what a rank has cannot be told again from the layouts alone."""
        self._shards: Mapping[str, tuple[str, ShardPlace]] = {}

    def local_tensors(self, given: NamedTensors) -> LocalTensors:
        """As the function of that name, which is asked if anything has another name or is laid out otherwise."""
        found = self._again(given)
        if found is None:
            found = local_tensors(given)
            self._given, self._shards = _described(given, found), found.shards
        return found

    def _again(self, given: NamedTensors) -> LocalTensors | None:
        before = self._given
        if before is None or list(given) != before.names:
            return None
        tensors = cast("list[torch.Tensor]", list(given.values()))
        if list(map(type, tensors)) != before.kinds:
            return None
        parts, layouts = _parts_of(tensors, before.kinds)
        if layouts != before.layouts or list(map(_PLACEMENTS, layouts)) != before.placements:
            return None
        if list(map(_SHAPE, parts)) != before.shapes:
            return None
        self._given = replace(before, layouts=layouts)  # the next step's are rather these than others that are equal
        found = dict(zip(before.labels, parts, strict=True))
        found.pop("", None)
        return LocalTensors(found, self._shards)


def _parts_of(tensors: list[torch.Tensor], kinds: list[type]) -> tuple[list[torch.Tensor], list[object]]:
    """What this rank has of each, and how DTensors among them are laid out.

    Raises:
        AttributeError: this torch's DTensors keep that elsewhere.
    """
    distributed = {kind for kind in set(kinds) if is_distributed(kind)}
    dealt = [kind in distributed for kind in kinds]
    parts = [_PART(tensor) if here else tensor for tensor, here in zip(tensors, dealt, strict=True)]
    return parts, list(map(_LAYOUT, itertools.compress(tensors, dealt)))


def _described(given: NamedTensors, local: LocalTensors) -> _Given | None:
    """What was given; None if some of it is no tensor, or lies here in several boxes."""
    kinds = list(map(type, given.values()))
    if not any(map(is_distributed, set(kinds))):
        return None  # plain tensors are looked through in no time
    if not all(issubclass(kind, torch.Tensor) for kind in set(kinds)):
        return None
    try:
        parts, layouts = _parts_of(cast("list[torch.Tensor]", list(given.values())), kinds)
        placements = list(map(_PLACEMENTS, layouts))
    except AttributeError:
        return None
    # By name, too: tied weights are one tensor under two.
    known = {(local.shards.get(label, (label,))[0], id(part)): label for label, part in local.tensors.items()}
    labels = [known.get((name, id(part)), "") for name, part in zip(given, parts, strict=True)]
    if any(part.numel() for part, label in zip(parts, labels, strict=True) if not label):
        return None  # in several boxes, or `to_local` gives something else
    return _Given(list(given), kinds, layouts, placements, list(map(_SHAPE, parts)), labels)
