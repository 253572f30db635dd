"""What stays the same from one filling of the same places to the next."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.device import type_of
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.source.copying import Stretch, comes_from_a_device, stretches_of
from checkpoint_engine.source.filling import FileRange
from checkpoint_engine.source.loader import Selection, require_carriable

__all__ = ["RefillPlan"]

_KIND: Callable[[torch.Tensor], tuple[torch.dtype, torch.Size]] = operator.attrgetter("dtype", "shape")


class RefillPlan:
    """Which tensors lie where, in stretches; and which ones were looked at: every step asks, mostly for the same."""

    def __init__(self, entries: Sequence[SegmentEntry]) -> None:
        """Of segments that hold what `entries` say."""
        self.entries = entries
        self._names = [tensor.label for entry in entries for tensor in entry.tensors]
        self._placed = dict.fromkeys(self._names)
        self._kinds = [
            (torch_dtype(tensor.dtype), torch.Size(tensor.shape)) for entry in entries for tensor in entry.tensors
        ]
        self._stretches: dict[bool, list[tuple[Stretch, ...]]] = {}
        self._seen: list[weakref.ref[torch.Tensor]] = []
        """Their owner may free them: he does not wait for us."""
        self._addresses: list[int] = []
        self._devices: frozenset[torch.device] = frozenset()

    def sources(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """These tensors in the order of their places, computed; None if they are others by name, dtype or shape.

        Raises:
            UnsupportedTensorError: one cannot be carried at all.
        """
        if tensors.keys() != self._placed.keys():
            return None
        found = [tensors[name] for name in self._names]
        self._look_at(found, tensors)
        if list(map(_KIND, found)) != self._kinds:
            return None
        for device in self._devices:
            # Our threads know nothing of the stream on which the caller computed them.
            type_of(device).synchronize(device)
        return found

    def ranges(self, selections: Sequence[Selection]) -> list[FileRange] | None:
        """Where in these files each tensor begins, in the order of their places; None if they are others."""
        found = {tensor.label: (one.file, tensor) for one in selections for tensor in one.tensors}
        if found.keys() != self._placed.keys():
            return None
        placed = (tensor for entry in self.entries for tensor in entry.tensors)
        if any(not _is_alike(tensor, found[tensor.label][1]) for tensor in placed):
            return None
        return [(file, file.data_start + tensor.offset) for file, tensor in map(found.__getitem__, self._names)]

    def stretches(self, sources: Sequence[torch.Tensor]) -> list[tuple[Stretch, ...]]:
        """Of each segment, for these tensors."""
        from_devices = all(map(comes_from_a_device, sources))
        if from_devices not in self._stretches:
            self._stretches[from_devices] = [
                stretches_of(entry.tensors, from_devices=from_devices) for entry in self.entries
            ]
        return self._stretches[from_devices]

    def _look_at(self, found: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """Those that are not the same objects at the same addresses as the last time: freed ones have none."""
        seen = [seen() for seen in self._seen]
        if len(seen) == len(found) and all(map(operator.is_, seen, found)) and _addresses(found) == self._addresses:
            return
        require_carriable(tensors)
        self._seen, self._addresses = [weakref.ref(tensor) for tensor in found], _addresses(found)
        self._devices = frozenset(tensor.device for tensor in found)


def _is_alike(tensor: TensorEntry, other: TensorEntry) -> bool:
    return (tensor.dtype, tensor.shape) == (other.dtype, other.shape)


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))
