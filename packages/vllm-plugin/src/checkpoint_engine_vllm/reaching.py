"""What a vLLM model computes with, wherever it holds it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from checkpoint_engine.sdk.plans import Reached, reach

__all__ = ["reach_weights"]

_NO_WEIGHTS = frozenset(
    (
        *("kv_cache", "kv_caches", "kv_cache_scales", "handler_tensor"),
        *("config", "vllm_config", "hf_config", "weight_loader", "checkpoint_engine_scales"),
        *("vllm.config.", "vllm.distributed.", "vllm.compilation.", "vllm.lora."),
    )
)
"""Attributes, and packages of objects, that are passed over: requests, addresses, settings, graphs, adapters."""


def reach_weights(model: torch.nn.Module, only: torch.nn.Module | None = None) -> Iterator[Reached]:
    """All tensors that a model, or one of its modules, computes with."""
    return reach(model, _NO_WEIGHTS, only=only)
