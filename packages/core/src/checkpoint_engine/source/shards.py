"""What a trainer has of its tensors: whole ones, torch's DTensors, and shards of which it says where they belong."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import msgspec
import torch

from checkpoint_engine.boxes import TensorBox, find_box_fault
from checkpoint_engine.catalog import SegmentEntry, ShardPlace, TensorEntry
from checkpoint_engine.errors import DuplicateTensorError, SettingError, UnsupportedTensorError

__all__ = ["LocalTensors", "NamedTensors", "TensorShard", "is_distributed", "local_tensors", "parts_of"]

_LAYOUTS_REMEMBERED = 1 << 12


@dataclass(frozen=True, eq=False)
class TensorShard:
    """A box of a tensor, and where in that it begins; ranks, or one rank, hold the rest of it.

    A view of a larger tensor will do: a trainer's fused or grouped parameter is given as shards of a checkpoint's
    tensors without any copy.
    """

    tensor: torch.Tensor
    """The elements of the box."""
    shape: Sequence[int]
    """Of the whole tensor."""
    offsets: Sequence[int]
    """Where the box begins in each dimension."""


NamedTensors = Mapping[str, torch.Tensor | TensorShard | Sequence[TensorShard]]
"""By name in the checkpoint: a tensor, a DTensor, a shard, or several shards of one tensor."""


@dataclass(frozen=True)
class LocalTensors:
    """Plain tensors of this rank by their labels (see `TensorEntry.label`), and of what the shards among them are."""

    tensors: Mapping[str, torch.Tensor]
    shards: Mapping[str, tuple[str, ShardPlace]]
    """Label of a shard -> name of its tensor, and its place."""

    @property
    def names(self) -> set[str]:
        """Of the tensors that they are, or are shards of."""
        return {self.shards[label][0] if label in self.shards else label for label in self.tensors}

    def entry(self, of: SegmentEntry) -> SegmentEntry:
        """The same, where shards are labelled as if they were tensors, with names and places."""
        if self.shards.keys().isdisjoint(tensor.name for tensor in of.tensors):
            return of
        return msgspec.structs.replace(of, tensors=tuple(map(self._named, of.tensors)))

    def _named(self, tensor: TensorEntry) -> TensorEntry:
        found = self.shards.get(tensor.name)
        return tensor if found is None else msgspec.structs.replace(tensor, name=found[0], shard=found[1])


def local_tensors(given: NamedTensors) -> LocalTensors:
    """Takes what this rank holds out of what it was given. Of a DTensor that may be nothing.

    Raises:
        UnsupportedTensorError: a shard does not lie within its tensor, or a DTensor is a sum that is still to be made.
        DuplicateTensorError: a box is given twice.
    """
    if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - callers need not be typed
        raise SettingError(
            f"named_tensors is a {type(given).__name__}; it maps names to tensors: dict(model.named_parameters())"
        )
    if not all(issubclass(kind, str) for kind in set(map(type, given))):
        strange = next(name for name in given if not isinstance(name, str))  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(f"{strange!r} is no name of a tensor; names are text")
    if all(issubclass(kind, torch.Tensor) and not is_distributed(kind) for kind in set(map(type, given.values()))):
        return LocalTensors(cast("Mapping[str, torch.Tensor]", given), {})  # every step comes here
    tensors: dict[str, torch.Tensor] = {}
    shards: dict[str, tuple[str, ShardPlace]] = {}
    with torch.no_grad():  # once, and not for each of thousands of DTensors
        for name, value in given.items():
            for part, whole, begin in parts_of(name, value):
                label, shape = name, tuple(part.shape)
                if shape != whole:
                    words, place = _place_of(whole, begin, shape)
                    label = name + words
                    shards[label] = name, place
                if label in tensors:
                    raise DuplicateTensorError(f"tensor {label!r} is given twice")
                tensors[label] = part
    return LocalTensors(tensors, shards)


@functools.lru_cache(_LAYOUTS_REMEMBERED)
def _place_of(whole: tuple[int, ...], begin: tuple[int, ...], shape: tuple[int, ...]) -> tuple[str, ShardPlace]:
    """A box of a tensor for people, and as catalogs have it; layers are cut alike."""
    return str(TensorBox(begin, shape)), ShardPlace(whole, begin)


_Runs = tuple[tuple[int, int], ...]
"""Along one dimension: where runs of indices begin, and how long they are."""
_Part = tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]
"""A tensor, the shape of what it is a part of, and where in that it begins."""


def parts_of(name: str, value: torch.Tensor | TensorShard | Sequence[TensorShard]) -> Iterator[_Part]:
    """What this rank has of a tensor: a tensor, the shape of what it is a part of, and where in that it begins.

    Raises:
        UnsupportedTensorError: as `local_tensors`.
    """
    if isinstance(value, torch.Tensor):
        if is_distributed(type(value)):
            yield from _parts_of_distributed(name, value)
        else:
            yield value, tuple(value.shape), (0,) * value.dim()
        return
    if not isinstance(value, (TensorShard, list, tuple)):
        raise UnsupportedTensorError(
            f"{name!r} is no tensor but a {type(value).__name__}; leave it out (`_extra_state` is no weight)"
        )
    for shard in [value] if isinstance(value, TensorShard) else value:
        if not isinstance(shard, TensorShard) or is_distributed(type(shard.tensor)):  # pyright: ignore[reportUnnecessaryIsInstance] - callers need not be typed
            raise UnsupportedTensorError(f"{name!r}: give plain tensors, DTensors, or TensorShards of plain tensors")
        box = TensorBox(tuple(shard.offsets), tuple(shard.tensor.shape))
        fault = find_box_fault(tuple(shard.shape), (box,))
        if fault is not None and fault.kind == "outside":
            raise UnsupportedTensorError(
                f"tensor {name!r}: a shard of shape {list(box.shape)} at {list(box.begin)} does not lie within "
                f"{list(shard.shape)}"
            )
        yield shard.tensor, tuple(shard.shape), box.begin


def is_distributed(kind: type) -> bool:
    """Whether these are DTensors; where nobody has imported those, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def _parts_of_distributed(name: str, tensor: torch.Tensor) -> Iterator[_Part]:
    given = cast("Any", tensor)
    mesh, placements = given.device_mesh, given.placements
    coordinate = mesh.get_coordinate()
    layout = _layout_of(tuple(tensor.shape), mesh, tuple(placements), coordinate and tuple(coordinate))
    if layout.fault:
        raise UnsupportedTensorError(f"tensor {name!r} {layout.fault}")
    if coordinate is None:  # this rank is not in the mesh
        return
    if torch.is_grad_enabled():
        with torch.no_grad():
            local: torch.Tensor = given.to_local()
    else:
        local = given.to_local()
    if layout.sizes != tuple(local.shape):
        raise UnsupportedTensorError(
            f"tensor {name!r} is laid out in a way that is not known here: {tuple(placements)} over a mesh of "
            f"{list(mesh.shape)} gives a part of shape {list(layout.sizes)}, and this rank's has {list(local.shape)}; "
            "give its parts as TensorShards"
        )
    if local.numel() or not tensor.numel():
        yield from _boxes_of(local, layout)


class _Layout(NamedTuple):
    """What of a distributed tensor a rank has."""

    whole: tuple[int, ...]
    runs: tuple[_Runs, ...] = ()
    sizes: tuple[int, ...] = ()
    begin: tuple[int, ...] | None = None
    """Where it begins, if it is one box."""
    fault: str = ""
    """Why it cannot be given."""


@functools.lru_cache(_LAYOUTS_REMEMBERED)
def _layout_of(
    whole: tuple[int, ...],
    mesh: Any,  # noqa: ANN401 - torch's; equal meshes have equal shapes
    placements: tuple[Any, ...],
    coordinate: tuple[int, ...] | None,
) -> _Layout:
    for placement in placements:
        if placement.is_partial():
            return _Layout(whole, fault=f"is still to be summed up over ranks ({placement}); redistribute it first")
    if coordinate is None:
        return _Layout(whole)
    runs = _runs_of(whole, tuple(mesh.shape), tuple(map(_cut_of, placements)), coordinate)
    begin = tuple(along[0][0] for along in runs) if all(len(along) == 1 for along in runs) else None
    return _Layout(whole, runs, tuple(sum(size for _, size in along) for along in runs), begin)


def _boxes_of(local: torch.Tensor, layout: _Layout) -> Iterator[_Part]:
    """A local tensor as boxes: mostly one, several where what follows each other here does not so in the whole."""
    if layout.begin is not None:
        yield local, layout.whole, layout.begin
        return
    placed: list[list[tuple[int, int, int]]] = []
    for along in layout.runs:
        ends = itertools.accumulate(size for _, size in along)
        placed.append([(begin, end - size, size) for (begin, size), end in zip(along, ends, strict=True)])
    for corner in itertools.product(*placed):
        part = local
        for dimension, (_, here, size) in enumerate(corner):
            part = part.narrow(dimension, here, size)
        yield part, layout.whole, tuple(begin for begin, _, _ in corner)


_Cut = tuple[int, int] | None
"""Of a placement: the dimension that it shards, and into how many parts that is divided beforehand; None if none."""


def _cut_of(placement: Any) -> _Cut:  # noqa: ANN401 - torch's placements
    dimension = getattr(placement, "dim", None)
    return None if dimension is None else (dimension, getattr(placement, "split_factor", 1))


@functools.lru_cache(_LAYOUTS_REMEMBERED)
def _runs_of(
    whole: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[_Cut, ...], coordinate: tuple[int, ...]
) -> tuple[_Runs, ...]:
    """Which indices of each dimension the rank at this place of the mesh has, as torch deals them out."""
    runs: list[_Runs] = [((0, size),) if size else ((0, 0),) for size in whole]
    for number, dimension, factor in _in_order(mesh, cuts):
        pieces = [_chunk(part, mesh[number], coordinate[number]) for part in _chunks(runs[dimension], factor)]
        runs[dimension] = _joined(tuple(run for piece in pieces for run in piece)) or ((0, 0),)
    return tuple(runs)


def _in_order(mesh: tuple[int, ...], cuts: tuple[_Cut, ...]) -> list[tuple[int, int, int]]:
    """The mesh's dimensions in the order in which they cut: number, dimension of the tensor, parts cut beforehand.

    That is their own order; but where one says that its dimension was divided beforehand into just as many parts as
    later ones cut it into, it was they who divided it (FSDP over tensor parallelism), and it comes after them.
    """
    order = [(number, *cut) for number, cut in enumerate(cuts) if cut is not None]
    for each in reversed(tuple(order)):
        number, dimension, factor = each
        later = [n for n, other, _ in order[order.index(each) + 1 :] if other == dimension]
        if later and factor > 1 and factor == math.prod(mesh[n] for n in later):
            order.remove(each)
            order.append((number, dimension, 1))
    return order


def _chunks(runs: _Runs, count: int) -> list[_Runs]:
    return [_chunk(runs, count, index) for index in range(count)] if count > 1 else [runs]


def _chunk(runs: _Runs, count: int, index: int) -> _Runs:
    """Part `index` of what `torch.chunk` makes of these indices: equal parts, of which the last may be smaller."""
    total = sum(size for _, size in runs)
    step = -(-total // count)
    low, high = min(total, index * step), min(total, (index + 1) * step)
    found: list[tuple[int, int]] = []
    before = 0
    for begin, size in runs:
        first, last = max(low, before), min(high, before + size)
        if first < last:
            found.append((begin + first - before, last - first))
        before += size
    return tuple(found)


def _joined(runs: _Runs) -> _Runs:
    joined: list[tuple[int, int]] = []
    for begin, size in runs:
        if joined and sum(joined[-1]) == begin:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((begin, size))
    return tuple(joined)
