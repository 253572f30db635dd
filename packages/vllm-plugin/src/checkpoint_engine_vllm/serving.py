"""What the served model's plan hangs on, besides the tensors that come: what a proof of it is kept under."""

from __future__ import annotations

import importlib.metadata
import logging
import platform

import torch

from checkpoint_engine.sdk.plans import KeptProofs
from checkpoint_engine_vllm import __version__, compat
from checkpoint_engine_vllm.protocols import Worker

__all__ = ["kept_proofs"]

_log = logging.getLogger(__name__)


def kept_proofs(worker: Worker) -> KeptProofs | None:
    """Those of engines like this one; None where it cannot be told which those are."""
    serving = _serving(worker)
    if serving is None:
        _log.info("this process proves its reload plan: vLLM does not tell what its kernels hang on")
        return None
    return KeptProofs(serving)


def _serving(worker: Worker) -> dict[str, object] | None:
    """Versions, device, configuration, and the worker's place among the others."""
    device, configuration = _kind_of(compat.device_of(worker)), compat.configuration(worker)
    if not device or not configuration:
        return None
    parallel = worker.vllm_config.parallel_config
    return {
        "engine": "vllm",
        "vllm": compat.version(),
        "checkpoint-engine-vllm": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "device": device,
        "model": f"{type(compat.target_model(worker)).__qualname__} {worker.model_config.dtype}",
        "configuration": configuration,
        "worker": f"{worker.rank} of replica {getattr(parallel, 'data_parallel_rank', 0)}",
    }


def _kind_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return ""
