"""What takes the weights of an update: a plugin implements it for its engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from checkpoint_engine.contract.figures import Details, Figures
from checkpoint_engine.contract.modes import ReloadMode

__all__ = ["Selective", "TensorSpec", "Tensors", "Update", "Verifiable", "WeightSink"]

Tensors = Sequence[tuple[str, torch.Tensor]]
"""By their names in the checkpoint; mostly a `checkpoint_engine.contract.delivery.Delivery`."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will look like when it comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Update:
    """One update as the engine sees it: where it comes from, and every tensor that will be delivered."""

    id: str
    checkpoint: str
    version: str
    tensors: Mapping[str, TensorSpec]
    reload: ReloadMode = "auto"
    open_ended: bool = False
    """Whether nobody can say beforehand what comes: `tensors` is empty, and what is missing shows at the end."""
    compared: bool = False
    """Whether every copy by reload plan is to be compared with what came, also once the plan is trusted."""
    partial: bool = False
    """Whether `tensors` are a part of a checkpoint, asked for as that: what they do not fill keeps what it holds."""


class WeightSink(Protocol):
    """Puts tensors into one worker of an engine.

    Calls come from one thread in the order `begin`, `load` …, `finish`; or `abort` at any point after `begin` was
    entered. All calls run on the worker's device with its current stream. Whatever a method raises ends the update.
    `checkpoint_engine.contract.engine_sink.EngineSink` keeps the books of all this.
    """

    def begin(self, update: Update) -> None:
        """Prepares for an update; nothing of the engine's weights may have changed if this raises."""
        ...

    def load(self, tensors: Tensors) -> None:
        """Takes tensors over, by their names in the checkpoint.

        Their memory is used again once this returns and the current stream has run dry: what is needed for longer
        must be copied.

        Raises:
            WeightsRejectedError: a tensor is unknown to the engine or has the wrong shape.
        """
        ...

    def finish(self) -> Figures | Details:
        """Completes the update; returns figures worth showing to people, or a map of some.

        Raises:
            WeightsRejectedError: tensors that the engine needs are missing.
        """
        ...

    def abort(self) -> bool:
        """Gives the update up; returns whether the weights are whole: exactly those held before the update."""
        ...


@runtime_checkable
class Selective(Protocol):
    """A sink that knows which bytes it will read, so that others need not come from other hosts."""

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Ranges (start, bytes) of a bucket that `load` will read in the update begun; None for all of it.

        Args:
            bucket: Names of its tensors, and where in it each begins.
        """
        ...


@runtime_checkable
class Verifiable(Protocol):
    """A sink whose engine can be compared with a checkpoint."""

    def verifier(self) -> WeightSink:
        """Takes tensors as an update would, and compares the engine's weights with what they would become.

        Nothing of the engine changes. Its `finish` returns `ComparisonFigures`.
        """
        ...
