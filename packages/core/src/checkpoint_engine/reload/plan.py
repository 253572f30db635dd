"""The reload plan: the list of copies by which an engine's loader turns tensors into parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import torch

from checkpoint_engine.reload.overheads import deferred_garbage
from checkpoint_engine.reload.regions import Region, find_flaws

__all__ = ["Fill", "Piece", "Recording", "ReloadPlan", "make_plan"]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """One copy: elements of a tensor go to as many elements of a target, in the order of their regions."""

    source: str
    source_dtype: torch.dtype
    """As what the tensor's memory is read; as wide as its own dtype."""
    region: Region
    """Counted from the tensor's first element."""
    target: str
    target_dtype: torch.dtype
    """As what the target's memory is written. Where it is not the source's, the copy casts."""
    target_region: Region
    """Counted from the target's first element."""

    @property
    def nbytes(self) -> int:
        """Bytes that it reads."""
        return self.region.elements * self.source_dtype.itemsize


@dataclass(frozen=True)
class Fill:
    """A constant that the loader writes, such as the zeros behind a padded vocabulary."""

    source: str
    """The tensor at which it did so."""
    target: str
    target_dtype: torch.dtype
    target_region: Region
    value: float


@dataclass
class Recording:
    """All that was seen while a loader ran."""

    pieces: dict[Piece, None] = field(default_factory=dict[Piece, None])
    """In order; a copy done twice counts once."""
    fills: list[Fill] = field(default_factory=list[Fill])
    flaws: dict[str, str] = field(default_factory=dict[str, str])
    """Target -> why it is not made of copies alone."""
    unreadable: dict[str, str] = field(default_factory=dict[str, str])
    """Tensor -> why its loader gave up without data."""
    origins: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Target -> every tensor that something in it comes from, be it by copies or not."""
    written: dict[str, int] = field(default_factory=dict[str, int])
    """Target -> elements written in all."""
    shares: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """Tensor and target -> elements of the target that this tensor decides on: that come from it, or that its loader
    fills up behind it."""
    joined: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Tensor -> tensors, itself among them, that the loader puts together, and so must be given in one call."""
    computed_with: set[str] = field(default_factory=set[str])
    """Tensors that the loader computes with before it writes, wherever they then lie."""
    complete: bool = True
    """Whether the loader was given all tensors."""

    def note_write(self, target: str, elements: int, sources: Collection[str]) -> None:
        """Counts a write of any kind."""
        self.written[target] = self.written.get(target, 0) + elements
        self.origins.setdefault(target, set()).update(sources)
        self.note_joined(sources)
        for name in sources:
            self.shares[name, target] = self.shares.get((name, target), 0) + elements

    def note_joined(self, sources: Collection[str]) -> None:
        """The loader has put these together."""
        if len(sources) > 1:
            group = frozenset(sources).union(*(self.joined.get(name, ()) for name in sources))
            self.joined.update(dict.fromkeys(group, group))

    def note_fill(self, fill: Fill) -> None:
        """Counts a constant that the loader wrote."""
        self.fills.append(fill)
        self.note_write(fill.target, fill.target_region.elements, ())
        key = (fill.source, fill.target)
        if fill.source:
            self.shares[key] = self.shares.get(key, 0) + fill.target_region.elements

    @property
    def taken(self) -> dict[str, int]:
        """Tensor -> elements of targets that it decides on."""
        found: dict[str, int] = {}
        for (name, _), elements in self.shares.items():
            found[name] = found.get(name, 0) + elements
        return found

    def drop(self, source: str) -> None:
        """Forgets the copies of a tensor."""
        self.pieces = {piece: None for piece in self.pieces if piece.source != source}


@dataclass(frozen=True)
class ReloadPlan:
    """Copies by source, and what they do not cover."""

    pieces: Mapping[str, tuple[Piece, ...]]
    """By source."""
    fills: Mapping[str, tuple[Fill, ...]]
    """By target; they are done once all copies into it are."""
    flaws: Mapping[str, str]
    """Target -> why the plan cannot be used for it."""
    loader_only: Mapping[str, str]
    """Tensor -> why only the engine's own loader can place it."""
    recording: Recording

    @property
    def targets(self) -> set[str]:
        """Everything that is written in any way."""
        return set(self.recording.origins) | set(self.flaws)

    @cached_property
    def digest(self) -> str:
        """Stands for all that was recorded: two loaders that have the same do the same to every tensor."""
        seen = self.recording
        tables = (self.pieces, self.fills, self.flaws, self.loader_only, seen.shares, seen.written)
        groups = (seen.origins, seen.joined)
        everything = (
            [sorted(table.items()) for table in tables],
            [sorted((name, sorted(names)) for name, names in group.items()) for group in groups],
            sorted(seen.computed_with),
            seen.complete,
        )
        return hashlib.sha256(msgspec.msgpack.encode(everything, enc_hook=str)).hexdigest()

    def covered(self, targets: Collection[str]) -> tuple[set[str], set[str]]:
        """Those of `targets` that share no tensor with what the loader must do, and the tensors that only they need."""
        covered_targets, origins, loaded = set(targets), self.recording.origins, set(self.loader_only)
        while True:
            loaded |= {name for target in self.targets - covered_targets for name in origins.get(target, ())}
            fewer = {target for target in covered_targets if loaded.isdisjoint(origins.get(target, ()))}
            if fewer == covered_targets:
                return covered_targets, self.pieces.keys() - loaded
            covered_targets = fewer

    def is_traced(self) -> bool:
        """Whether for every tensor it is known where it goes to."""
        return self.recording.complete and not self.untraced()

    def untraced(self) -> dict[str, str]:
        """Tensors of which it is not known where they go to, and why."""
        traced = set[str]().union(*self.recording.origins.values()) if self.loader_only else set[str]()
        return {name: why for name, why in self.loader_only.items() if name not in traced}


@deferred_garbage()
def make_plan(recording: Recording, targets: Mapping[str, torch.Tensor]) -> ReloadPlan:
    """Orders a recording, and finds the targets that it covers only in part, or writes twice.

    Args:
        recording: What was seen.
        targets: Parameters and buffers of the model without data, after its loader has run. Those that nothing was
            written to are no flaw: whether they need weights is the engine's business.
    """
    by_source: dict[str, list[Piece]] = {}
    by_target: dict[str, list[Region]] = {}
    fills: dict[str, list[Fill]] = {}
    for piece in recording.pieces:
        by_source.setdefault(piece.source, []).append(piece)
        by_target.setdefault(piece.target, []).append(piece.target_region)
    for fill in recording.fills:
        fills.setdefault(fill.target, []).append(fill)
        by_target.setdefault(fill.target, []).append(fill.target_region)
    flaws = dict(recording.flaws)
    for name, target_regions in by_target.items():
        tensor = targets.get(name)
        if name in flaws:
            continue
        if tensor is None:
            flaws[name] = "replaced by its loader"
        else:
            whole = Region.of(tensor).moved(-int(tensor.storage_offset()))
            found = find_flaws(whole, target_regions)
            if found:
                flaws[name] = found
    return ReloadPlan(
        {name: tuple(pieces) for name, pieces in by_source.items()},
        {name: tuple(found) for name, found in fills.items()},
        flaws,
        dict(recording.unreadable),
        recording,
    )
