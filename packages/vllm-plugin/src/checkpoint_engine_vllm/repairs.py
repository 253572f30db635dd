"""What vLLM's CPU backend forgets when weights are reloaded (seen in 0.32; on a GPU nothing needs repair)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch

from checkpoint_engine_vllm import compat

__all__ = ["CpuRepairs", "Repairs"]


class Repairs:
    """Nothing to repair."""

    def before(self, model: torch.nn.Module) -> None:
        """Called before a reload starts."""

    def after(self, model: torch.nn.Module) -> None:
        """Called after a reload has finished."""

    def undo(self, renewed: Iterable[torch.nn.Module]) -> None:
        """Takes back what `before` did, except to layers that have got their new weights."""


class CpuRepairs(Repairs):
    """What only the first load does, so that a reload would go on with old weights, or with none.

    - Experts: `moe_kernel` holds their packed copy and is made only while it is None. (On a GPU it must stay: captured
      CUDA graphs point into it.)
    - An output layer tied to the embedding: it gets no weights of its own, so its packed copy is never renewed.
    - int8: the packed weight points at the scales that it was made with, which a reload lets go of.
    """

    def __init__(self) -> None:
        self._kernels: dict[int, tuple[Any, Any]] = {}

    def before(self, model: torch.nn.Module) -> None:
        """Forgets the packed experts, so that they are packed again."""
        compat.keep_scales_of_packed_weights()
        for layer in model.modules():
            method: Any = getattr(layer, "quant_method", None)
            kernel = getattr(method, "moe_kernel", None)
            if kernel is not None:
                self._kernels[id(method)] = (method, kernel)
                method.moe_kernel = None

    def after(self, model: torch.nn.Module) -> None:
        """Packs tied output layers again."""
        for layer in model.modules():
            weight, method = getattr(layer, "weight", None), cast("Any", getattr(layer, "quant_method", None))
            if hasattr(layer, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.numel():
                method.process_weights_after_loading(layer)

    def undo(self, renewed: Iterable[torch.nn.Module]) -> None:
        """Gives layers that keep their old weights their packed experts back."""
        for layer in renewed:
            self._kernels.pop(id(getattr(layer, "quant_method", None)), None)
        for method, kernel in self._kernels.values():
            method.moe_kernel = kernel
        self._kernels.clear()
