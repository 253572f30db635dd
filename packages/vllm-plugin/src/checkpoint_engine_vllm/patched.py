"""Puts the tensors of an update into one worker of vLLM 0.10.2 to 0.15, which has no layerwise reload.

Loads go straight into the parameters, and layers are processed for their kernels once all tensors have come. Layers in
FP8 survive that in a vLLM patched by `checkpoint-engine-vllm patch`; other quantised ones do not, and are refused.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from checkpoint_engine.sdk import (
    EngineSink,
    MissingDependencyError,
    Tensors,
    Update,
    UpdateFigures,
    WeightsRejectedError,
    listed,
)
from checkpoint_engine.sdk.fit import NOT_FILLED
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import Worker

__all__ = ["STATE", "PatchedSink", "is_needed"]

STATE = "_checkpoint_engine_reload"
"""What the patch leaves on layers that can be loaded again; see patches/reloadable.py."""
_RELOADABLE = "vllm.model_executor.layers.quantization.utils.reloadable"


def is_needed() -> bool:
    """Whether the installed vLLM is too old for `VllmSink`."""
    try:
        return importlib.util.find_spec("vllm.model_executor.model_loader.reload") is None
    except ModuleNotFoundError:
        return False


class PatchedSink(EngineSink):
    """The sink of one worker of an old vLLM; see `checkpoint_engine.contract.engine_sink`."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker
        self._filled: set[str] | None = set()
        """Parameters that got weights; None if vLLM does not tell."""
        self._written = False

    def check(self, update: Update) -> None:
        """Checks that this vLLM can load its model again.

        Raises:
            MissingDependencyError: it cannot; the message says which version or patch can.
        """
        if update.reload == "plan":
            raise MissingDependencyError(_needs_newer("cannot be updated by reload plan"))
        if compat.draft_model(self._worker) is not None:
            raise MissingDependencyError(_needs_newer("cannot take new weights for a draft model"))
        if hasattr(compat.target_model(self._worker), "lora_manager"):
            raise MissingDependencyError(_needs_newer("cannot take new weights below LoRA adapters"))
        if self._is_miscounted():
            raise MissingDependencyError(
                _needs_newer("loads only half of weights that it quantises for several tensor-parallel workers")
            )
        for name, layer in compat.modules_by_name(compat.target_model(self._worker)).items():
            _check_layer(name, layer)

    def open(self, update: Update) -> None:
        """Begins to count."""
        del update
        self._filled, self._written = set(), False

    def take(self, tensors: Tensors) -> None:
        """Gives tensors to vLLM's loaders, which copy them."""
        self._written = True
        load: Callable[..., set[str] | None] = compat.target_model(self._worker).load_weights  # type: ignore[reportAssignmentType]
        with compat.engine_context(self._worker):
            filled = load(tensors)
        self._filled = None if filled is None or self._filled is None else self._filled | filled

    def complete(self, update: Update) -> UpdateFigures:
        """Checks that every parameter got its weights, and has layers processed for their kernels.

        Raises:
            WeightsRejectedError: weights are missing.
        """
        del update
        model = compat.target_model(self._worker)
        if self._filled is not None:
            missing = _weights(model) - self._filled
            if missing:
                raise WeightsRejectedError(f"{NOT_FILLED}: {listed(sorted(missing))}")
        with compat.engine_context(self._worker):
            self._process(model)
        return UpdateFigures(reload="patched", loader_bytes=self.nbytes, engine={"vllm": compat.version()})

    def restore(self) -> bool:
        """What was loaded cannot be taken back."""
        if self._written and _patch_is_in():
            importlib.import_module(_RELOADABLE).abandon(compat.target_model(self._worker))
        return not self._written

    def _is_miscounted(self) -> bool:
        """Whether vLLM 0.13 takes layers for complete too early, already when it starts."""
        config = self._worker.vllm_config
        quantises = getattr(config.quant_config, "is_checkpoint_fp8_serialized", True) is False
        return compat.version().startswith("0.13.") and quantises and config.parallel_config.tensor_parallel_size > 1

    def _process(self, model: torch.nn.Module) -> None:
        process = importlib.import_module("vllm.model_executor.model_loader.utils").process_weights_after_loading
        before = {name: (param, param.data) for name, param in model.named_parameters()}
        try:
            process(model, self._worker.model_config, compat.device_of(self._worker))
        except RuntimeError as error:
            if "came only in part" not in str(error):
                raise
            raise WeightsRejectedError(str(error)) from error
        for name, param in model.named_parameters():
            _put_back(param, *before.get(name, (param, param.data)))


def _patch_is_in() -> bool:
    return importlib.util.find_spec(_RELOADABLE) is not None


def _check_layer(name: str, layer: torch.nn.Module) -> None:
    method = getattr(layer, "quant_method", None)
    kind = type(method).__name__
    if method is None or kind.startswith("Unquantized") or STATE in vars(layer):
        return
    if kind.startswith(("Fp8", "BaseKVCache")) and not _patch_is_in():
        raise MissingDependencyError(
            f"{_needs_newer(f'cannot reload {name} ({kind})')}; or run checkpoint-engine-vllm patch in its "
            "environment, and start it again"
        )
    raise MissingDependencyError(_needs_newer(f"cannot reload {name} ({kind})"))


def _put_back(param: torch.nn.Parameter, before: torch.nn.Parameter, memory: torch.Tensor) -> None:
    """Undoes what some unquantised experts do: they move to other memory, which captured graphs do not know."""
    if param is before and param.data_ptr() != memory.data_ptr():
        memory.copy_(param.data)
        param.data = memory


def _weights(model: torch.nn.Module) -> set[str]:
    """Parameters that every checkpoint fills; scales may be absent from one."""
    return {name for name, _ in model.named_parameters() if "scale" not in name}


def _needs_newer(problem: str) -> str:
    return f"vLLM {compat.version()} {problem}; use vLLM 0.16 or newer: pip install --upgrade 'vllm>=0.16'"
