"""A second model without data, over which vLLM's loader is run to see where tensors go."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, cast

import torch

from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import ModelConfig, VllmConfig

_EXPERTS = "expert_map_manager"
"""Knows which experts are here; not in 0.16."""


def build_without_data(config: VllmConfig, model_config: ModelConfig) -> torch.nn.Module:
    """Builds a model on the meta device beside the live one, sharing nothing with it.

    Args:
        config: vLLM's configuration; a copy of it is used.
        model_config: The model's own, where that differs from the one in `config`.
    """
    config = copy.copy(config)
    config.compilation_config = compilation = copy.copy(config.compilation_config)
    # Layers register themselves here by name; those of the live model must stay who they are.
    compilation.static_forward_context = {}
    if hasattr(compilation, "static_all_moe_layers"):
        compilation.static_all_moe_layers = []
    _switch_off_compilation(compilation)
    vllm_config = importlib.import_module("vllm.config")
    initialize = importlib.import_module("vllm.model_executor.model_loader.utils").initialize_model
    with (
        torch.no_grad(),
        vllm_config.set_current_vllm_config(config),
        compat.default_dtype(model_config.dtype),
        _own_rotary_embeddings(),
        _expert_maps_with_data(),
        torch.device("meta"),
    ):
        return initialize(vllm_config=config, model_config=model_config)


def lend_tables(live: torch.nn.Module, model: torch.nn.Module) -> None:
    """Gives a model without data the live one's integer tables: loaders look up in them which experts are here."""
    for prefix, layer in compat.modules_by_name(model).items():
        try:
            served = live.get_submodule(prefix)
        except AttributeError:
            continue
        buffers = dict(served.named_buffers(recurse=False))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            found = buffers.get(name)
            if found is not None and not found.is_floating_point() and found.shape == buffer.shape:
                setattr(layer, name, found)
        if _EXPERTS in vars(served):
            setattr(layer, _EXPERTS, vars(served)[_EXPERTS])


def _switch_off_compilation(compilation: object) -> None:
    modes = getattr(importlib.import_module("vllm.config"), "CompilationMode", None)
    if modes is not None and hasattr(compilation, "mode"):
        cast("Any", compilation).mode = modes.NONE


@contextlib.contextmanager
def _own_rotary_embeddings() -> Generator[None]:
    """Neither takes the rotary embeddings that vLLM caches for the whole process, nor leaves any without data there."""
    module = importlib.import_module("vllm.model_executor.layers.rotary_embedding")
    cached: dict[Any, Any] = getattr(module, "_ROPE_DICT", {})
    before = dict(cached)
    cached.clear()
    try:
        yield
    finally:
        cached.clear()
        cached.update(before)


@contextlib.contextmanager
def _expert_maps_with_data() -> Generator[None]:
    """Has vLLM make the maps of which experts are here with data: it reads them while it builds a layer."""
    package = "vllm.model_executor.layers.fused_moe"
    manager = getattr(_optional(f"{package}.{_EXPERTS}"), "ExpertMapManager", None)
    layer = _optional(f"{package}.layer")
    owner, name = (manager, "__init__") if manager is not None else (layer, "determine_expert_map")
    original: Callable[..., object] | None = getattr(owner, name, None)
    if original is None:
        yield
        return

    @wraps(original)
    def make(*arguments: Any, **options: Any) -> object:  # noqa: ANN401 - vLLM's own
        with torch.device("cpu"):
            return original(*arguments, **options)

    setattr(owner, name, make)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _optional(module: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
