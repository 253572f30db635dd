"""Replays a reload plan: batched copies out of a bucket, with a few launches a bucket."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoint_engine.device.host_copies import copy_from_host
from checkpoint_engine.reload.plan import Fill, Piece, ReloadPlan
from checkpoint_engine.reload.regions import Region, contiguous


@dataclass
class _Step:
    """A piece, made ready."""

    piece: Piece
    batched: bool
    """Whether it can be one of many copies of a launch: dense on both sides, without a cast."""
    target: torch.Tensor | None
    """Where it goes; None if that is another place in every update."""


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
        self.nbytes = sum(step.piece.nbytes for steps in self._steps.values() for step in steps)
        """Bytes that one update reads."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]], moving: Mapping[str, torch.Tensor]) -> None:
        """Copies what these tensors bring, on the current stream.

        Args:
            tensors: Contiguous, by name; those that the plan does not have are passed over.
            moving: Target -> its memory, for those whose place is not fixed.
        """
        batches: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, tensor in tensors:
            for step in self._steps.get(name, ()):
                target = step.target
                if target is None:
                    target = view_of(moving[step.piece.target], step.piece.place, step.piece.target_dtype)
                source = view_of(tensor, step.piece.region, step.piece.source_dtype)
                if step.batched:
                    targets, sources = batches.setdefault(step.piece.source_dtype, ([], []))
                    targets.append(target)
                    sources.append(source)
                else:
                    _copy(target, source)
        for targets, sources in batches.values():
            _copy_all(targets, sources)

    def fill(self, target: str, memory: torch.Tensor) -> None:
        """Writes the constants that belong into a target."""
        for fill in self._fills.get(target, ()):
            _fill(fill, memory)

    def fill_fixed(self) -> None:
        """Writes the constants of all targets with a fixed place."""
        for name in self._fills:
            if name in self._fixed:
                self.fill(name, self._fixed[name])


def view_of(memory: torch.Tensor, region: Region, dtype: torch.dtype) -> torch.Tensor:
    """A region of a tensor, read as `dtype`, which is as wide as its own."""
    return region.view(memory if memory.dtype == dtype else memory.view(dtype))


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Many copies in one launch; torch has no public name for it, and its optimisers rely on this one."""
    if _comes_from_host(targets[0], sources[0]):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        return
    cast("Any", torch)._foreach_copy_(targets, sources)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if _comes_from_host(target, source):
        copy_from_host(target, source)
    else:
        target.copy_(source)


def _comes_from_host(target: torch.Tensor, source: torch.Tensor) -> bool:
    return source.device.type == "cpu" and target.device.type != "cpu"


def _make_step(piece: Piece, target: torch.Tensor | None) -> _Step:
    return _Step(
        piece,
        batched=piece.source_dtype == piece.target_dtype and _is_dense(piece.region) and _is_dense(piece.place),
        target=None if target is None else view_of(target, piece.place, piece.target_dtype),
    )


def _is_dense(region: Region) -> bool:
    return region.stride == contiguous(region.shape)


def _fill(fill: Fill, memory: torch.Tensor) -> None:
    view_of(memory, fill.place, fill.target_dtype).fill_(fill.value)
