"""What a loader notes beside the weights: flags and numbers of layers that nothing but its own run sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import cast

import torch

__all__ = ["Switch", "changed_switches", "switches_of"]

Switch = bool | int | float | str

_HELPERS = ("quant_method", "scheme")
"""Attributes of layers under which engines keep what processes them."""
_MISSING = object()


def switches_of(model: torch.nn.Module) -> dict[str, Switch]:
    """Flags, numbers and words that a model's layers hold, and what processes them; not what is only remembered."""
    return {
        f"{prefix}.{type(owner).__name__}.{name}": value
        for prefix, module in cast("Iterator[tuple[str, torch.nn.Module]]", model.named_modules())
        for owner in (module, *(cast("object", getattr(module, helper, None)) for helper in _HELPERS))
        for name, value in cast("Mapping[str, object]", getattr(owner, "__dict__", {})).items()
        if isinstance(value, (bool, int, float, str))
        and not isinstance(getattr(type(owner), name, None), cached_property)
    }


def changed_switches(before: Mapping[str, Switch], after: Mapping[str, Switch]) -> dict[str, Switch]:
    """Those that were set meanwhile, and what to."""
    return {name: value for name, value in after.items() if before.get(name, _MISSING) != value}
