"""What a rank was given in the step before: a trainer gives the same DTensors in each, and thousands of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoint_engine.catalog import ShardPlace
from checkpoint_engine.source.shards import LocalTensors, NamedTensors, is_distributed, local_tensors

__all__ = ["GivenBefore"]


@dataclass(frozen=True)
class _Given:
    name: str
    tensor: weakref.ref[torch.Tensor]
    """Its owner may free it: he does not wait for us."""
    placements: object
    """Of a DTensor, the very object; None of a plain tensor."""
    shape: torch.Size
    """Of what this rank has."""
    label: str
    """What that is called; empty if it is nothing."""


class GivenBefore:
    """Of one checkpoint."""

    def __init__(self) -> None:
        self._given: list[_Given] = []
        """Empty if that cannot be told again from the objects alone."""
        self._shards: Mapping[str, tuple[str, ShardPlace]] = {}

    def local_tensors(self, given: NamedTensors) -> LocalTensors:
        """As the function of that name, which is asked if anything is another object, or is laid out otherwise."""
        found = self._again(given)
        if found is None:
            found = local_tensors(given)
            self._given, self._shards = _described(given, found), found.shards
        return found

    def _again(self, given: NamedTensors) -> LocalTensors | None:
        if not self._given or len(given) != len(self._given):
            return None
        tensors: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for (name, value), before in zip(given.items(), self._given, strict=True):
                if name != before.name or value is not before.tensor() or not isinstance(value, torch.Tensor):
                    return None
                part, placements = _part_of(value)
                if placements is not before.placements or part.shape != before.shape:
                    return None
                if before.label:
                    tensors[before.label] = part
        return LocalTensors(tensors, self._shards)


def _part_of(tensor: torch.Tensor) -> tuple[torch.Tensor, object]:
    """What this rank has of a tensor, the same object as long as that is so, and how that was dealt out."""
    if not is_distributed(type(tensor)):
        return tensor, None
    distributed = cast("Any", tensor)
    return distributed.to_local(), distributed.placements


def _described(given: NamedTensors, local: LocalTensors) -> list[_Given]:
    """What was given; nothing if some of it is no tensor, or lies here in several boxes."""
    if not any(map(is_distributed, set(map(type, given.values())))):
        return []  # plain tensors are looked through in no time
    # By name, too: tied weights are one tensor under two.
    labels = {(local.shards.get(label, (label,))[0], id(part)): label for label, part in local.tensors.items()}
    found: list[_Given] = []
    with torch.no_grad():
        for name, value in given.items():
            if not isinstance(value, torch.Tensor):
                return []
            part, placements = _part_of(value)
            label = labels.get((name, id(part)), "")
            if not label and part.numel():
                return []
            found.append(_Given(name, weakref.ref(value), placements, part.shape, label))
    return found
