"""What a family of the zoo is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint, and how an engine serves it."""

    architecture: str
    """As an engine lists it."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the tiny configuration, which is made from that of transformers."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine."""
    whole: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration before it is made tiny."""
    made_by: str = ""
    """The class of transformers that makes it, where that is called otherwise."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What names begin with, where transformers writes others than published checkpoints have: its own -> published."""
    tokenizer: bool = False
    """Whether its loader asks the tokenizer for tokens."""
    own_head: bool = False
    """Whether the checkpoint has an output layer of its own although its configuration says that it is tied."""
