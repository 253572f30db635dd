"""What third-party scripts import of upstream's module of this name, as far as it means something here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

from checkpoint_engine.errors import MissingDependencyError
from checkpoint_engine.planning.buckets import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__: list[str] = []

_USE_INSTEAD = {
    "_inplace_pin_memory": "ParameterServer.register_checkpoint(name, files=[...])",
    "_normal_pin_memory": "ParameterServer.register_checkpoint(name, files=[...], use_inplace_pin_memory=False)",
    "_register_checkpoint": "ParameterServer.register_checkpoint",
    "_load_checkpoint": "safetensors.torch.load_file",
    "_load_checkpoint_file": "safetensors.torch.load_file",
    "_concat_tp_weights": "torch.cat",
}


def _align_size(dtype: torch.dtype, shape: Sequence[int]) -> int:  # pyright: ignore[reportUnusedFunction]
    """Bytes that a tensor takes up in a segment."""
    return align_up(math.prod(shape) * dtype.itemsize)


def __getattr__(name: str) -> NoReturn:
    """Says what does the same here.

    Raises:
        MissingDependencyError: an `ImportError`, so that `from ... import` shows what it says.
    """
    if name in _USE_INSTEAD:
        raise MissingDependencyError(f"{__name__}.{name} is not here: use {_USE_INSTEAD[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
