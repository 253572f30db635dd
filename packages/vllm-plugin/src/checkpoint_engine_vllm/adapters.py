"""LoRA adapters of an engine: one is replaced; and where the base is updated, they stay, neither seen nor demanded.

vLLM wraps layers once its first checkpoint is loaded. Wrappers give parameters other names than loaders know, and hold
the adapters.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Generator, Mapping, MutableMapping
from typing import Any, cast

import torch

__all__ = ["adapter_request", "renew_adapters", "take_adapter", "without_adapters", "wrapped_experts"]

logger = logging.getLogger(__name__)

_OF_EXPERTS = "FusedMoEWithLoRA"


def adapter_request(name: str, number: int, directory: str, *, anew: bool) -> Any:  # noqa: ANN401 - vLLM's own
    """As vLLM is told of an adapter; `anew` whether it is loaded once more if it is there."""
    kind: Any = importlib.import_module("vllm.lora.request").LoRARequest
    return kind(lora_name=name, lora_int_id=number, lora_path=directory, load_inplace=anew)


def take_adapter(worker: Any, name: str, number: int, directory: str) -> str:  # noqa: ANN401 - vLLM's own
    """Has a worker load an adapter anew, or forget it if there is no directory; returns what went wrong.

    Nothing is raised: where one of several workers raises, vLLM takes the others' answers for those to its next call.
    """
    try:
        if directory:
            worker.add_lora(adapter_request(name, number, directory, anew=True))
        else:
            worker.remove_lora(number)
    except Exception as error:
        logger.exception("this worker could not load the LoRA adapter %r", name)
        return f"{type(error).__name__}: {error}"
    return ""


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
