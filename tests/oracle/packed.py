"""What layers compute whose weights only a kernel can read: their output for the identity is their weights."""

from __future__ import annotations

from typing import Any

import torch

_WIDTHS = ("input_size_per_partition", "input_size", "embedding_dim")
"""Attributes by which both engines' layers say how many features they take."""


class Packed:
    """A probe for `contents`: applies quantised and packed linear layers to one fixed input."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def __call__(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        method: Any = getattr(module, "quant_method", None)
        widths = [width for name in _WIDTHS if isinstance(width := getattr(module, name, None), int)]
        if not widths or not hasattr(method, "apply") or not hasattr(module, "weight"):
            return {}
        dtype = getattr(module, "params_dtype", None) or self._dtype
        identity = torch.eye(widths[0], dtype=dtype, device=self._device)
        with torch.no_grad():
            try:
                return {"apply(eye)": method.apply(module, identity)}
            except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
                # Of no default dtype: an engine that failed to start may have left its own behind.
                return {f"apply(eye) raises {type(error).__name__}": torch.empty(0, dtype=torch.uint8)}
