"""What an update is for, and how its tensors are taken over.

Both travel in one word, which says `verify` where nothing is to be taken over at all.
"""

from __future__ import annotations

import enum
from typing import Literal

__all__ = ["Operation", "ReloadMode", "WireMode", "mode_of", "operation_of", "word_for"]

ReloadMode = Literal["auto", "plan", "loader"]
"""How tensors get from a bucket into the engine: by the reload plan as far as it reaches (`auto`), by nothing but the
plan (`plan`), or by the engine's own loader (`loader`)."""

WireMode = Literal["auto", "plan", "loader", "verify"]
"""As it travels: a reload mode of an update that replaces weights, or `verify` for one that compares them."""


class Operation(enum.Enum):
    """What an update is for."""

    REPLACE = "replace"
    """The engine takes the tensors over as its weights."""
    COMPARE = "compare"
    """The engine's weights are compared with what the tensors would make of them; nothing of it changes."""


def operation_of(word: WireMode) -> Operation:
    """What an update is for that travels under this word."""
    return Operation.COMPARE if word == "verify" else Operation.REPLACE


def word_for(operation: Operation, mode: ReloadMode) -> WireMode:
    """How an update travels."""
    return "verify" if operation is Operation.COMPARE else mode


def mode_of(word: WireMode) -> ReloadMode:
    """How its tensors are taken over; a comparison takes none."""
    return "auto" if word == "verify" else word
