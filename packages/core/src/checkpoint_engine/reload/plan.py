"""The reload plan: the list of copies by which an engine's loader turns tensors into parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import msgspec
import torch

from checkpoint_engine.reload.overheads import kept_garbage
from checkpoint_engine.reload.regions import Region, find_flaws


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
    place: Region
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
    place: Region
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
    taken: dict[str, int] = field(default_factory=dict[str, int])
    """Tensor -> elements of targets that come from it."""
    joined: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Tensor -> tensors, itself among them, that the loader puts together, and so must be given in one call."""
    complete: bool = True
    """Whether the loader was given all tensors."""

    def note_write(self, target: str, elements: int, sources: Collection[str]) -> None:
        """Counts a write of any kind."""
        self.written[target] = self.written.get(target, 0) + elements
        self.origins.setdefault(target, set()).update(sources)
        if len(sources) > 1:
            group = frozenset(sources).union(*(self.joined.get(name, ()) for name in sources))
            self.joined.update(dict.fromkeys(group, group))
        for name in sources:
            self.taken[name] = self.taken.get(name, 0) + elements

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

    def covered(self, targets: Collection[str]) -> tuple[set[str], set[str]]:
        """Those of `targets` that share no tensor with what the loader must do, and the tensors that only they need."""
        kept, origins, loaded = set(targets), self.recording.origins, set(self.loader_only)
        while True:
            loaded |= {name for target in self.targets - kept for name in origins.get(target, ())}
            fewer = {target for target in kept if loaded.isdisjoint(origins.get(target, ()))}
            if fewer == kept:
                return kept, self.pieces.keys() - loaded
            kept = fewer

    def is_traced(self) -> bool:
        """Whether for every tensor it is known where it goes to."""
        return self.recording.complete and all(
            any(name in sources for sources in self.recording.origins.values()) for name in self.loader_only
        )


@kept_garbage()
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
        by_target.setdefault(piece.target, []).append(piece.place)
    for fill in recording.fills:
        fills.setdefault(fill.target, []).append(fill)
        by_target.setdefault(fill.target, []).append(fill.place)
    flaws = dict(recording.flaws)
    for name, places in by_target.items():
        tensor = targets.get(name)
        if name in flaws:
            continue
        if tensor is None:
            flaws[name] = "replaced by its loader"
        else:
            whole = Region.of(tensor).moved(-int(tensor.storage_offset()))
            found = find_flaws(whole, places)
            if found:
                flaws[name] = found
    return ReloadPlan(
        {name: tuple(pieces) for name, pieces in by_source.items()},
        {name: tuple(found) for name, found in fills.items()},
        flaws,
        dict(recording.unreadable),
        recording,
    )
