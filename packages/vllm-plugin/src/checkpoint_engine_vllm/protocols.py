"""What is used of vLLM's own objects, so that types can be checked without vLLM."""

from __future__ import annotations

from inspect import BoundArguments
from typing import Any, Protocol

import torch

__all__ = ["LayerState", "ModelConfig", "VllmConfig", "Worker"]


class ModelConfig(Protocol):
    """vLLM's configuration of one model."""

    model: str
    dtype: torch.dtype
    enforce_eager: bool


class VllmConfig(Protocol):
    """vLLM's whole configuration."""

    parallel_config: Any
    compilation_config: Any
    speculative_config: Any
    quant_config: Any
    load_config: Any


class Worker(Protocol):
    """A worker of vLLM, on a GPU or the CPU."""

    rank: int
    device: torch.device | None
    vllm_config: VllmConfig
    model_config: ModelConfig
    model_runner: Any


class LayerState(Protocol):
    """What vLLM notes about a module while its weights are reloaded."""

    load_numel: int
    load_numel_total: int | None
    """None while the module does not wait for weights."""
    loaded_weights: list[tuple[str, BoundArguments]]
    kernel_tensors: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    """Parameters and buffers as they were before the reload."""
    restore_metadata: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    """Parameters and buffers as a checkpoint fills them, without data."""
