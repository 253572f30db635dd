"""What a worker tells of an update or a comparison, for people and for tests.

It travels as one flat map, in which an engine's own figures stand beside those that all engines have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["ComparisonFigures", "Details", "Figures", "UpdateFigures", "details_of"]

Details = Mapping[str, str | int | float]
"""Figures as they travel."""


class UpdateFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one worker that took an update."""

    tensors: int = 0
    partial: int = 0
    """1 if they were a part of a checkpoint, asked for as that."""
    reload: str = ""
    """How they were taken over: by `plan`, by the `loader`, or by the loader in `proof` of the plan."""
    plan_bytes: int = 0
    """Bytes of the tensors that copies took over."""
    read_bytes: int = 0
    """How many of those this worker's copies read: what it keeps of them, unless one needs a whole tensor."""
    loader_bytes: int = 0
    """Of those that the engine's own loader did."""
    loader_reason: str = ""
    """Why it did."""
    cloned_bytes: int = 0
    """Bytes copied because they were needed for longer than their bucket lived."""
    check_seconds: float = 0.0
    load_seconds: float = 0.0
    finish_seconds: float = 0.0
    engine: Details = {}
    """Figures that only this engine has, under names of its own."""

    def details(self) -> dict[str, str | int | float]:
        """As they travel; nothing where nothing is known."""
        return {} if self == UpdateFigures() else {**self.engine, **_own_figures(self)}

    @classmethod
    def from_details(cls, details: Details) -> UpdateFigures:
        """What `details` gave, also where another version of this project has left some out or added some."""
        known = _known(cls, details)
        return cls(**known, engine={name: value for name, value in details.items() if name not in known})


class ComparisonFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one worker whose weights were compared with a checkpoint."""

    compared_tensors: int = 0
    compared_bytes: int = 0
    different_tensors: int = 0
    different: str = ""
    """The first of them, for people."""
    not_compared: str = ""
    """The first of those that could not be, with the reasons."""
    unseen_tensors: int = 0
    """How many of those come from the checkpoint, and may therefore be wrong."""

    @property
    def equal(self) -> bool:
        """Whether something was compared, all that was is the same, and nothing of the checkpoint was left out."""
        return self.compared_tensors > 0 and not self.different_tensors and not self.unseen_tensors

    def details(self) -> dict[str, str | int | float]:
        """As they travel."""
        return _own_figures(self)

    @classmethod
    def from_details(cls, details: Details) -> ComparisonFigures:
        """What `details` gave; figures that are none of a comparison are left out."""
        return cls(**_known(cls, details))


Figures = UpdateFigures | ComparisonFigures


def details_of(said: Figures | Details) -> dict[str, str | int | float]:
    """What a sink said of its update, as it travels."""
    return said.details() if isinstance(said, (UpdateFigures, ComparisonFigures)) else dict(said)


def _own_figures(figures: Figures) -> dict[str, str | int | float]:
    return {name: getattr(figures, name) for name in figures.__struct_fields__ if name != "engine"}


def _known(kind: type[msgspec.Struct], details: Details) -> dict[str, Any]:
    """The figures that the struct has fields for, and of the kind that those hold."""
    defaults = dict(zip(kind.__struct_fields__, kind.__struct_defaults__, strict=True))
    return {name: value for name, value in details.items() if _is_alike(value, defaults.get(name))}


def _is_alike(value: object, default: object) -> bool:
    return isinstance(value, (int, float)) if isinstance(default, float) else type(value) is type(default)
