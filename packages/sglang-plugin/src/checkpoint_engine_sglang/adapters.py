"""LoRA adapters in a worker: loaded out of files that the front has copied, without a pickle."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType] - of its paths

from checkpoint_engine.sdk.adapters import CONFIG, WEIGHTS

__all__ = ["adapter_reference", "forget_adapter", "load_adapter"]

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


def forget_adapter(scheduler: Any, adapter: tuple[str, str, str, bool]) -> None:  # noqa: ANN401
    """Also what is left of one that did not load."""
    try:
        done = scheduler.tp_worker.model_runner.unload_lora_adapter(adapter_reference(*adapter))
    except Exception:
        logger.exception("the LoRA adapter %r is not unloaded", adapter[1])
        return
    if not done.success:
        logger.error("the LoRA adapter %r is not unloaded: %s", adapter[1], done.error_message)
