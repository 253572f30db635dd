"""A second model without data, over which vLLM's loader is run to see where tensors go."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, cast

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import ModelConfig, VllmConfig

__all__ = ["build_without_data", "is_lazy", "share_tables"]

_EXPERTS = "expert_map_manager"
"""Knows which experts are here; not in 0.16."""


def build_without_data(config: VllmConfig, model_config: ModelConfig) -> torch.nn.Module:
    """Builds a model on the meta device beside the live one, sharing nothing with it.

    Args:
        config: vLLM's configuration; a copy of it is used.
        model_config: The model's own, where that differs from the one in `config`.
    """
    config = copy.copy(config)
    config.compilation_config = copy.copy(config.compilation_config)
    _switch_off_compilation(config.compilation_config)
    try:
        return _build(config, model_config, torch.device("meta"))
    except NotImplementedError:  # it reads numbers that it has made, such as the slopes of ALiBi
        return _build(config, model_config, _MemoryWithoutData())


def _build(config: VllmConfig, model_config: ModelConfig, made_by: AbstractContextManager[object]) -> torch.nn.Module:
    compilation: Any = config.compilation_config
    # Layers register themselves here by name; those of the live model must stay who they are.
    compilation.static_forward_context = {}
    if hasattr(compilation, "static_all_moe_layers"):
        compilation.static_all_moe_layers = []
    vllm_config = importlib.import_module("vllm.config")
    initialize = importlib.import_module("vllm.model_executor.model_loader.utils").initialize_model
    with (
        torch.no_grad(),
        vllm_config.set_current_vllm_config(config),
        compat.default_dtype(model_config.dtype),
        _own_rotary_embeddings(),
        _expert_maps_with_data(),
        torch.device("cpu"),
        made_by,
    ):
        model = initialize(vllm_config=config, model_config=model_config)
    _leave_no_data(model)
    return model


class _MemoryWithoutData(TorchFunctionMode):
    """Leaves numbers that a model makes in memory, and takes it from what only waits for weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own signature
        del types
        named: dict[str, Any] = kwargs or {}
        if func in _WAITING and named.get("device") is None:
            named = {**named, "device": "meta"}
        return func(*args, **named)


_WAITING = frozenset((torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full))


def share_tables(live: torch.nn.Module, model: torch.nn.Module) -> None:
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


def _leave_no_data(model: torch.nn.Module) -> None:
    """Takes memory from what a model makes on a device that it names itself; tables of numbers keep theirs."""
    known: dict[int, torch.Tensor] = {}
    for layer in model.modules():
        for held in (vars(layer)["_parameters"], vars(layer)["_buffers"]):  # assigning would ask for a parameter
            for name, tensor in cast("dict[str, torch.Tensor | None]", held).items():
                if tensor is not None and tensor.is_floating_point() and not tensor.is_meta and not is_lazy(tensor):
                    held[name] = cast("Any", known.setdefault(id(tensor), _without_data(tensor)))


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """The same kind of tensor, with the same loader."""
    empty: Any = tensor.detach().to("meta")
    if isinstance(tensor, torch.nn.Parameter):
        empty = torch.nn.Parameter(empty, requires_grad=False)
    empty.__class__ = tensor.__class__
    empty.__dict__.update(tensor.__dict__)
    return empty


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no shape yet."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


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
