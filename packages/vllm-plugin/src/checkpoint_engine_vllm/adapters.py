"""LoRA adapters of an engine whose base model is updated: they stay as they are, and are neither seen nor demanded.

vLLM wraps layers once its first checkpoint is loaded. Wrappers give parameters other names than loaders know, and hold
the adapters.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Mapping, MutableMapping
from typing import Any, cast

import torch

__all__ = ["renew_adapters", "without_adapters", "wrapped_experts"]

_OF_EXPERTS = "FusedMoEWithLoRA"


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Generator[None]:
    """Has a model look as it did before vLLM wrapped its layers: the wrappers stand aside."""
    wrapped = list(_wrapped(model)) if hasattr(model, "lora_manager") else []
    for place, name, wrapper in wrapped:
        place[name] = _inside(wrapper)
    try:
        yield
    finally:
        for place, name, wrapper in wrapped:
            place[name] = wrapper


def renew_adapters(model: torch.nn.Module) -> None:
    """Writes the active adapters into their slots anew, from host memory: sleep may have thrown away what lay there.

    vLLM itself forgets all adapters when weights are replaced, also those that no file has.
    """
    manager: Any = getattr(model, "lora_manager", None)
    if manager is None:
        return
    pinned = set(getattr(manager._active_adapters, "pinned_items", ()))  # noqa: SLF001 - vLLM tells it nowhere else
    active = [adapter for adapter in list(manager.list_adapters()) if manager.deactivate_adapter(adapter)]
    for adapter in active:
        manager.activate_adapter(adapter)
        if adapter in pinned:
            manager.pin_adapter(adapter)
    manager._last_mapping = None  # noqa: SLF001 - they may have changed slots
    for wrapper in manager.modules.values():
        reset = getattr(wrapper, "reset_sharded_to_full_mapping", None)  # new in 0.32
        if reset is not None:
            reset()


def wrapped_experts(model: torch.nn.Module) -> list[str]:
    """Experts that vLLM has wrapped: their wrappers hold the kernel of the start, and their loader knows of them."""
    wrappers: Mapping[str, object] = getattr(getattr(model, "lora_manager", None), "modules", {})
    return [name for name, each in wrappers.items() if any(kind.__name__ == _OF_EXPERTS for kind in type(each).__mro__)]


def _wrapped(model: torch.nn.Module) -> Generator[tuple[MutableMapping[str, torch.nn.Module | None], str, Any]]:
    """Where each wrapper stands, and under which name."""
    kinds = _kinds()
    for parent in model.modules():
        if not isinstance(parent, kinds):
            place = cast("Any", parent)._modules  # noqa: SLF001 - past torch's own checks, which cost
            yield from ((place, name, child) for name, child in place.items() if isinstance(child, kinds))


def _inside(wrapper: Any) -> torch.nn.Module:  # noqa: ANN401 - vLLM's own
    kinds, layer = _kinds(), wrapper
    while isinstance(layer, kinds):
        layer = layer.base_layer
    return layer


def _kinds() -> tuple[type, ...]:
    """The class of all wrappers; none where nothing was wrapped, for then nobody has imported it."""
    found = getattr(sys.modules.get("vllm.lora.layers"), "BaseLayerWithLoRA", None)
    return () if found is None else (found,)
