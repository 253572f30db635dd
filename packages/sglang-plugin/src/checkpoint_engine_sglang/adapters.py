"""LoRA adapters in a worker: loaded out of files that the front has copied, and kept while the base is updated.

SGLang wraps layers once its first checkpoint is loaded. Wrappers give parameters other names than loaders know.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType] - of its paths

from checkpoint_engine.sdk.adapters import CONFIG, WEIGHTS
from checkpoint_engine_sglang.compat import named_modules

__all__ = ["adapter_reference", "cannot_keep", "forget_adapter", "load_adapter", "without_adapters"]

logger = logging.getLogger(__name__)


def adapter_reference(identity: str, name: str, directory: str, pinned: bool) -> Any:  # noqa: ANN401, FBT001 - SGLang's own
    """As SGLang knows an adapter."""
    kind: Any = importlib.import_module("sglang.srt.lora.lora_registry").LoRARef
    return kind(lora_id=identity, lora_name=name, lora_path=directory, pinned=pinned)


def load_adapter(scheduler: Any, adapter: tuple[str, str, str, bool]) -> str:  # noqa: ANN401
    """Loads it, whatever format SGLang was told to read weights in; returns what went wrong."""
    directory = Path(adapter[2])
    try:
        tensors: dict[str, torch.Tensor] = load_file(directory / WEIGHTS)
        config = msgspec.json.decode((directory / CONFIG).read_bytes(), type=dict[str, Any])
        runner = scheduler.tp_worker.model_runner
        done = runner.load_lora_adapter_from_tensors(adapter_reference(*adapter), tensors, config)
    except Exception as error:  # whatever it is, every worker must hear of it
        logger.exception("this worker could not load the LoRA adapter %r", adapter[1])
        return f"{type(error).__name__}: {error}"
    return "" if done.success else str(done.error_message or "SGLang does not take it")


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Generator[None]:
    """Has a model look as it did before SGLang wrapped its layers: the wrappers stand aside."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, _kinds())
        for name, child in parent.named_children()
        if isinstance(child, _kinds())
    ]
    for parent, name, wrapper in wrapped:
        setattr(parent, name, wrapper.base_layer)
    try:
        yield
    finally:
        for parent, name, wrapper in wrapped:
            setattr(parent, name, wrapper)
            for own in ("weight", "bias"):  # of the layer, which they hold as well
                if getattr(wrapper, own, None) is not None:
                    setattr(wrapper, own, getattr(wrapper.base_layer, own))


def cannot_keep(model: torch.nn.Module) -> str:
    """Why adapters do not outlast an update of their base; empty if they do."""
    experts = _kinds("FusedMoEWithLoRA")
    wrapped = next((name for name, each in named_modules(model) if isinstance(each, experts)), None)
    if wrapped is None:
        return ""
    return (
        f"SGLang has wrapped experts for LoRA ({wrapped}), and their wrappers keep what they compute with: leave them "
        "out of --lora-target-modules, or start the engine anew with this checkpoint"
    )


def forget_adapter(scheduler: Any, adapter: tuple[str, str, str, bool]) -> None:  # noqa: ANN401
    """Also what is left of one that did not load."""
    try:
        done = scheduler.tp_worker.model_runner.unload_lora_adapter(adapter_reference(*adapter))
    except Exception:
        logger.exception("the LoRA adapter %r is not unloaded", adapter[1])
        return
    if not done.success:
        logger.error("the LoRA adapter %r is not unloaded: %s", adapter[1], done.error_message)


def _kinds(name: str = "BaseLayerWithLoRA") -> tuple[type[torch.nn.Module], ...]:
    """A class of wrappers, by default that of all; none where nothing was wrapped, for then nobody has imported it."""
    found = getattr(sys.modules.get("sglang.srt.lora.layers"), name, None)
    return () if found is None else (found,)
