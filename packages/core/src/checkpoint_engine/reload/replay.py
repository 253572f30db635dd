"""Replays a reload plan: batched copies out of a bucket, with a few calls a bucket.

What is copied are byte runs. They are worked out once for a bucket that comes again, wherever it then lies.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

from checkpoint_engine.contract.delivery import Delivery, Place
from checkpoint_engine.device import PreparedCopies, prepare_copies
from checkpoint_engine.planning.byte_runs import CopyLayout, PlannedCopy, box_of, plan_byte_runs
from checkpoint_engine.reload.cutting import cut_copy
from checkpoint_engine.reload.overheads import without_functions
from checkpoint_engine.reload.plan import Fill, Piece, ReloadPlan
from checkpoint_engine.reload.regions import Region, contiguous

__all__ = ["Replay", "view_of"]

_GAP = 16 << 10
"""Bytes that are fetched from another host although nobody reads them, rather than in two reads."""


@dataclass
class _Step:
    """A piece, made ready."""

    piece: Piece
    batched: bool
    """Whether it can be one of many copies of a launch: dense on both sides, without a cast."""
    target: torch.Tensor | None
    """Where it goes; None if that is another place in every update."""


_Found = tuple[int, tuple[Place, ...], _Step]
"""Number of a tensor in its bucket, where it lies, and a piece of it."""


class Replay:
    """Copies tensors to where a plan says. One object serves any number of updates."""

    def __init__(
        self,
        plan: ReloadPlan,
        fixed: Mapping[str, torch.Tensor],
        moving: Collection[str] = (),
    ) -> None:
        """Makes the copies ready.

        Args:
            plan: Whose copies.
            fixed: Target -> its memory, which stays where it is.
            moving: Targets whose memory is given anew for every call of `load`.

        Copies into any other target are left out: the engine's own loader does those.
        """
        self._steps = {
            name: [
                _make_step(piece, fixed.get(piece.target))
                for piece in pieces
                if piece.target in fixed or piece.target in moving
            ]
            for name, pieces in plan.pieces.items()
        }
        self._fills = plan.fills
        self._fixed = fixed
        self._in_one_place = len({tensor.device for tensor in fixed.values()}) <= 1
        self._programs: WeakKeyDictionary[object, _Program] = WeakKeyDictionary()
        self.nbytes = sum(step.piece.nbytes for steps in self._steps.values() for step in steps)
        """Bytes that one update reads."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]], moving: Mapping[str, torch.Tensor]) -> int:
        """Copies what these tensors bring, on the current stream; returns how many bytes of them it reads.

        Args:
            tensors: Contiguous, by name; those that the plan does not have are passed over.
            moving: Target -> its memory, for those whose place is not fixed.
        """
        if isinstance(tensors, Delivery) and tensors.bucket is not None and self._in_one_place:
            return self._program_for(tensors).run(tensors, self._fixed, moving)
        with without_functions():
            return self._copy_each(tensors, moving)

    def _copy_each(self, tensors: Sequence[tuple[str, torch.Tensor]], moving: Mapping[str, torch.Tensor]) -> int:
        read = 0
        batches: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, tensor in tensors:
            for step in self._steps.get(name, ()):
                target = step.target
                if target is None:
                    target = view_of(moving[step.piece.target], step.piece.target_region, step.piece.target_dtype)
                source = view_of(tensor, step.piece.region, step.piece.source_dtype)
                read += step.piece.nbytes
                if step.batched:
                    targets, sources = batches.setdefault(step.piece.source_dtype, ([], []))
                    targets.append(target)
                    sources.append(source)
                else:
                    _copy(target, source)
        for targets, sources in batches.values():
            _copy_all(targets, sources)
        return read

    def spans(self, bucket: Iterable[tuple[str, int]]) -> tuple[tuple[int, int], ...]:
        """Ranges (start, bytes) of a bucket that are read; `bucket` says where in it each tensor begins."""
        copies = (
            _read_of(step.piece, at) for name, at in bucket for step in self._steps.get(name, ()) if step.piece.nbytes
        )
        return tuple((start, nbytes) for _, start, nbytes in plan_byte_runs(copies).spans(_GAP))

    def _program_for(self, delivery: Delivery) -> _Program:
        # Memory that stays mapped has a program of its own, which goes with it.
        key = delivery if delivery.stays else delivery.bucket
        program = self._programs.get(key)
        if program is None:
            self._programs[key] = program = _Program(self._steps, delivery)
        return program

    def fill(self, target: str, memory: torch.Tensor) -> None:
        """Writes the constants that belong into a target."""
        for fill in self._fills.get(target, ()):
            _fill(fill, memory)

    def fill_fixed(self) -> None:
        """Writes the constants of all targets with a fixed place."""
        for name in self._fills:
            if name in self._fixed:
                self.fill(name, self._fixed[name])


class _Program:
    """What is to be copied out of one bucket."""

    def __init__(self, steps: Mapping[str, Sequence[_Step]], delivery: Delivery) -> None:
        found = [
            (number, places, step)
            for number, (name, places) in enumerate(zip(delivery.names, delivery.places(), strict=True))
            for step in steps.get(name, ())
        ]
        fixed = [part for part in found if part[2].target is not None]
        moving = [part for part in found if part[2].target is None]
        self._fixed = _Runs(fixed, source_stays=delivery.stays, targets_stay=True)
        self._moving = _Runs(moving, source_stays=delivery.stays, targets_stay=False)

    def run(self, delivery: Delivery, fixed: Mapping[str, torch.Tensor], moving: Mapping[str, torch.Tensor]) -> int:
        """Copies, on the current stream; returns how many bytes that reads."""
        self._fixed.run(delivery, fixed)
        self._moving.run(delivery, moving)
        return self._fixed.reads + self._moving.reads


class _Runs:
    """Copies into targets of one kind: those that stay where they are, or those that do not."""

    def __init__(self, found: Sequence[_Found], *, source_stays: bool, targets_stay: bool) -> None:
        """Takes pieces, each of the tensor of that number, which lies in those places."""
        self._source_stays, self._targets_stay = source_stays, targets_stay
        self._numbers: dict[str, int] = {}
        """Target -> its number; each of them in this order."""
        copies: list[PlannedCopy] = []
        of: list[tuple[int, Piece]] = []
        others: dict[tuple[int, Piece], None] = {}
        """What is copied by itself, out of the whole tensor: casts, and what no rows make up."""
        whole: dict[int, int] = {}
        """Bytes of a tensor that has to be put together for them."""
        for number, places, step in found:
            planned = self._copies_of(step.piece, places)
            if places[0].box is not None:
                whole[number] = math.prod(places[0].whole) * step.piece.source_dtype.itemsize
            if planned is None:
                others[number, step.piece] = None
            else:
                copies += planned
                of += [(number, step.piece)] * len(planned)
        self._runs = plan_byte_runs(copies)
        self._others = list(others | dict.fromkeys(of[copy] for copy in self._runs.apart))
        self.reads = self._runs.nbytes + sum(whole.get(number, piece.nbytes) for number, piece in self._others)
        """Bytes."""
        self._copies: PreparedCopies | None = None

    def run(self, delivery: Delivery, targets: Mapping[str, torch.Tensor]) -> None:
        """Copies into these targets."""
        chosen = [targets[name] for name in self._numbers]
        if chosen:
            if self._copies is None:
                self._copies = prepare_copies(
                    self._runs, chosen[0].device, source_stays=self._source_stays, targets_stay=self._targets_stay
                )
            self._copies.start(delivery.blocks, chosen)
        for number, piece in self._others:
            target = view_of(targets[piece.target], piece.target_region, piece.target_dtype)
            _copy(target, view_of(delivery[number][1], piece.region, piece.source_dtype))

    def _copies_of(self, piece: Piece, places: Sequence[Place]) -> list[PlannedCopy] | None:
        """A piece as copies out of the places of its tensor; None if it casts, or boxes cut it into too many."""
        if piece.source_dtype != piece.target_dtype:
            return None
        found: list[tuple[Place, Region, Region]] = []
        for place in places:
            parts = ((piece.region, piece.target_region),)
            if place.box is not None:
                parts = cut_copy(piece.region, piece.target_region, place.whole, place.box)
            if parts is None:
                return None
            found += ((place, source, into) for source, into in parts)
        target = self._numbers.setdefault(piece.target, len(self._numbers))
        return [_planned(place, source, target, into, piece.source_dtype.itemsize) for place, source, into in found]


def _planned(place: Place, source: Region, target: int, into: Region, item: int) -> PlannedCopy:
    layout = CopyLayout(source.shape, source.stride, into.stride, item)
    return PlannedCopy(place.block, place.at + source.offset * item, target, into.offset * item, layout)


def _read_of(piece: Piece, at: int) -> PlannedCopy:
    """What a piece reads, as if it were copied to a place of its own; as one row where its elements lie apart."""
    item, region = piece.source_dtype.itemsize, piece.region
    layout = CopyLayout(region.shape, region.stride, contiguous(region.shape), item)
    if box_of(layout) is None:
        last = sum((size - 1) * step for size, step in zip(region.shape, region.stride, strict=True))
        layout = CopyLayout((last + 1,), (1,), (1,), item)
    return PlannedCopy(0, at + region.offset * item, 0, 0, layout)


def view_of(memory: torch.Tensor, region: Region, dtype: torch.dtype) -> torch.Tensor:
    """A region of a tensor, read as `dtype`, which is as wide as its own."""
    return region.view(memory if memory.dtype == dtype else memory.view(dtype))


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Many copies in one launch; torch has no public name for it, and its optimisers rely on this one."""
    cast("Any", torch)._foreach_copy_(targets, sources)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Elements that lie apart on one side, and casts: both are faster on the device."""
    target.copy_(source.to(target.device, non_blocking=True))


def _make_step(piece: Piece, target: torch.Tensor | None) -> _Step:
    return _Step(
        piece,
        batched=piece.source_dtype == piece.target_dtype and _is_dense(piece.region) and _is_dense(piece.target_region),
        target=None if target is None else view_of(target, piece.target_region, piece.target_dtype),
    )


def _is_dense(region: Region) -> bool:
    return region.stride == contiguous(region.shape)


def _fill(fill: Fill, memory: torch.Tensor) -> None:
    view_of(memory, fill.target_region, fill.target_dtype).fill_(fill.value)
