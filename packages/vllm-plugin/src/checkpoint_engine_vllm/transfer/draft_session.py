"""An update of the draft model alone, by vLLM's `start_draft_weight_update`: vLLM's loader takes it over."""

from __future__ import annotations

import os

import torch

from checkpoint_engine.sdk import Tensors
from checkpoint_engine.sdk.fit import NOT_FILLED, refuse
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import ModelConfig, Worker
from checkpoint_engine_vllm.reload import LayerwiseReload, is_torn
from checkpoint_engine_vllm.repairs import CpuRepairs, Repairs
from checkpoint_engine_vllm.sink import LENIENT

__all__ = ["DraftSession"]


class DraftSession:
    """One update; a few layers, so that nothing is planned."""

    def __init__(self, worker: Worker, model: torch.nn.Module, model_config: ModelConfig) -> None:
        self._worker = worker
        shared = frozenset(compat.target_model(worker).modules())
        repairs = CpuRepairs() if compat.on_cpu(worker) else Repairs()
        self._reload = LayerwiseReload(model, model_config, repairs, shared)
        self._begun = False

    def begin(self) -> None:
        """Makes the model ready."""
        with compat.engine_context(self._worker):
            self._begun = True
            self._reload.begin()

    def load(self, tensors: Tensors) -> None:
        """Gives tensors to vLLM's loader."""
        with compat.engine_context(self._worker):
            self._reload.load(tensors)

    def finish(self) -> None:
        """Completes the model.

        Raises:
            WeightsRejectedError: parameters got nothing.
        """
        with compat.engine_context(self._worker):
            missing = [f"{name} of the draft model" for name in self._reload.incomplete()]
            halves, lenient = list(filter(is_torn, missing)), os.environ.get(LENIENT) == "1"
            refuse(NOT_FILLED, missing, engine="vLLM", variable=LENIENT, lenient=lenient, halves=halves)
            self._reload.finish()
            self._begun = False

    def abort(self) -> None:
        """Puts the old weights back into layers that are not complete."""
        if self._begun:
            self._begun = False
            with compat.engine_context(self._worker):
                self._reload.abort()
