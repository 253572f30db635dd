"""vLLM without an engine: a model by vLLM's own loader, and a worker that has nothing but it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.oracle.packed import Packed
from tests.oracle.walk import Contents, contents
from tests.zoo.families import Family
from tests.zoo.stand_ins import stand_in_for

__all__ = ["ENVIRONMENT", "build", "contents_of", "prepare"]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CHECKPOINT_ENGINE_PROOFS": "off",  # the first update of each family is its proof
}
"""To be set before vLLM is imported."""


_NOTES = (
    "checkpoint_engine_scales",
    "_do_torchao_reload",
    "_original_do_torchao_reload",
    "_already_called_process_weights_after_loading",
)
"""By which vLLM and the plugin remember what they have done."""


class _Runner:
    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def get_model(self) -> torch.nn.Module:
        return self._model

    def get_draft_model(self) -> None:
        return None


def prepare(device: torch.device, rendezvous: Path) -> None:
    """Makes this process one that vLLM can build models in; `rendezvous` is a file that nobody else uses."""
    stand_in_for("torchvision")
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda function: function()  # a process for each family, for its class alone
    if device.type == "cpu":
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker for the CPU does
    else:
        torch.cuda.set_device(device)
    distributed: Any = importlib.import_module("vllm.distributed")
    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    config: Any = importlib.import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig()):
        backend = "gloo" if device.type == "cpu" else "nccl"
        distributed.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, backend)
        distributed.ensure_model_parallel_initialized(1, 1)
    state._EP = state._EP or state._TP


def build(family: Family, checkpoint: Path, load_format: str, device: torch.device) -> Any:
    """A worker that serves a checkpoint, or (`dummy`) a model of its shape with noise for weights."""
    rotary: Any = importlib.import_module("vllm.model_executor.layers.rotary_embedding")
    rotary._ROPE_DICT.clear()  # kept for engines of the same process, of which there is only one elsewhere
    arguments: Any = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    config = arguments(
        model=str(checkpoint),
        load_format=load_format,
        enforce_eager=True,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        use_tqdm_on_load=False,
        seed=0,
        **{"skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 128, **family.options},
    ).create_engine_config()
    with importlib.import_module("vllm.config").set_current_vllm_config(config):
        model = importlib.import_module("vllm.model_executor.model_loader").get_model(vllm_config=config)
    return SimpleNamespace(
        rank=0,
        device=device,
        vllm_config=config,
        model_config=config.model_config,
        parallel_config=config.parallel_config,
        model_runner=_Runner(model),
    )


def contents_of(worker: Any) -> Contents:
    """What the oracle sees of a worker's model."""
    config = importlib.import_module("vllm.config")
    with torch.no_grad(), config.set_current_vllm_config(worker.vllm_config):
        probe = Packed(worker.model_config.dtype, worker.device)
        return contents(worker.model_runner.get_model(), [probe], _NOTES)
