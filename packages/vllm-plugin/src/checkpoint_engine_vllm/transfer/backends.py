"""The backends by name, and how vLLM gets to know them; nothing here imports what a backend needs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["BACKENDS", "NATIVE", "register"]

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see

NATIVE = "checkpoint_engine"
BACKENDS: Mapping[str, tuple[str, str]] = {
    NATIVE: ("checkpoint_engine_vllm.transfer.native", "NativeTransfer"),
    "checkpoint_engine_ipc": ("checkpoint_engine_vllm.transfer.ipc", "IpcReceiver"),
    "checkpoint_engine_nccl": ("checkpoint_engine_vllm.transfer.nccl", "NcclReceiver"),
}
"""Name -> module and class."""


def register() -> None:
    """Makes the backends known to this process's vLLM, once; one without weight transfer (before 0.16) has no use."""
    try:
        factory: Any = importlib.import_module("vllm.distributed.weight_transfer").WeightTransferEngineFactory
    except (ImportError, AttributeError):
        return
    for name, home in BACKENDS.items():
        _register(factory, name, home)
    trainers: Any = getattr(importlib.import_module(factory.__module__), "WeightTransferTrainerFactory", None)
    if trainers is not None:  # 0.26 and newer
        _register(trainers, NATIVE, ("checkpoint_engine_vllm.transfer.trainer", "NativeTrainer"))


def _register(factory: Any, name: str, home: tuple[str, str]) -> None:  # noqa: ANN401 - vLLM's own class
    try:
        factory.register_engine(name, *home)
    except ValueError:  # vLLM calls plugins several times in a process
        logger.debug("weight-transfer backend %s is registered already", name)
