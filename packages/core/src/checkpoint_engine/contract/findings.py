"""What a comparison of an engine's weights with a checkpoint found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from checkpoint_engine.contract.figures import ComparisonFigures

__all__ = ["Findings", "listed", "same_bytes"]

_MOST_NAMES = 8
"""Names repeated in a report."""


@dataclass
class Findings:
    """Of one worker. Names are those of the engine's parameters."""

    tensors: int = 0
    nbytes: int = 0
    different: list[str] = field(default_factory=list[str])
    not_compared: list[str] = field(default_factory=list[str])
    """With the reason behind the name."""
    unseen: int = 0
    """How many of those come from the checkpoint."""

    def note(self, name: str, held: torch.Tensor, expected: torch.Tensor) -> None:
        """Compares two tensors byte by byte."""
        self.tensors += 1
        self.nbytes += held.nbytes
        if not same_bytes(held, expected):
            self.different.append(name)

    def leave_out(self, name: str, why: str) -> None:
        """Something of the checkpoint could not be compared."""
        self.not_compared.append(f"{name} ({why})")
        self.unseen += 1

    def add(self, other: Findings) -> None:
        """Takes over what was found in another model of the worker."""
        self.tensors += other.tensors
        self.nbytes += other.nbytes
        self.different += other.different
        self.not_compared += other.not_compared
        self.unseen += other.unseen

    def figures(self) -> ComparisonFigures:
        """What is told of it."""
        return ComparisonFigures(
            compared_tensors=self.tensors,
            compared_bytes=self.nbytes,
            different_tensors=len(self.different),
            different=listed(self.different),
            not_compared=listed(self.not_compared),
            unseen_tensors=self.unseen,
        )

    def details(self) -> dict[str, str | int | float]:
        """The same as it travels."""
        return self.figures().details()


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same elements, bit by bit, so that NaN equals NaN and 0.0 is not -0.0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_raw(one), _raw(other.to(one.device)))


def listed(names: Sequence[str]) -> str:
    """The first of them, as text."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
