"""Plugins that tests hang into SGLang beside ours, or in place of it: faults on demand, and what CPU workers lack.

Which of them a server loads is said by SGLANG_PLUGINS; see conftest.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

FAULT_FILE = "CHECKPOINT_ENGINE_TEST_FAULT_FILE"


def faults() -> None:
    """What a file says goes wrong: a tensor at which the loader fails, processing that fails, a slow model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        torch.cuda.synchronize = _nothing_to_wait_for  # SGLang before 0.5.22 does so for checksums on any device
    model = "sglang.srt.models.qwen3.Qwen3ForCausalLM"
    linear = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"
    HookRegistry.register(f"{model}.load_weights", _load_weights, HookType.AROUND)
    HookRegistry.register(f"{model}.forward", _forward, HookType.AROUND)
    HookRegistry.register(f"{linear}.process_weights_after_loading", _process, HookType.AROUND)


def plain_kernels() -> None:
    """Lets FP8 models run; and fails at their processing on demand."""
    import plain_kernels as kernels
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    kernels.install()
    method = "sglang.srt.layers.quantization.fp8.Fp8LinearMethod"
    HookRegistry.register(f"{method}.process_weights_after_loading", _process, HookType.AROUND)


def unpinned() -> None:
    """Lets LoRA adapters run: SGLang pins memory for them on any device. And fails at loading one on demand."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for maker in ("tensor", "empty", "zeros", "ones", "arange"):
        setattr(torch, maker, _without_pinning(getattr(torch, maker)))
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}.load_lora_adapter_from_tensors", _load_adapter, HookType.AROUND)


def cpu_identity() -> None:
    """Gives SGLang's own worker the identity that a parameter server on the CPU knows it by."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    worker = "sglang.srt.checkpoint_engine.checkpoint_engine_worker.SGLangCheckpointEngineWorkerExtensionImpl"
    HookRegistry.register(
        f"{worker}.get_device_uuid", lambda _: f"cpu:{torch.distributed.get_rank()}", HookType.REPLACE
    )


def second_model() -> None:
    """Has every worker report a draft model beside the served one; a real one does not run on the CPU."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    updater = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    HookRegistry.register(
        f"{updater}._select_runners",
        lambda runners, *_, **__: [*runners, ("draft", runners[0][1])],
        HookType.AFTER,
    )


def _nothing_to_wait_for(*_: object, **__: object) -> None: ...


def _without_pinning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return make


def _load_adapter(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    done = original(*args, **kwargs)
    if (fault := _fault()).get("adapter"):
        _fail(fault)
    return done


def _fault() -> dict[str, Any]:
    file = Path(os.environ[FAULT_FILE])
    fault = json.loads(file.read_text()) if file.exists() else {}
    ranks = fault.get("ranks")
    return fault if ranks is None or torch.distributed.get_rank() in ranks else {}


def _fail(fault: dict[str, Any]) -> NoReturn:
    if fault.get("once"):
        Path(os.environ[FAULT_FILE]).unlink()
    raise RuntimeError("a fault made by the test")


def _load_weights(original: Callable[..., Any], model: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
    fault = _fault()

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name == fault.get("tensor") and not tensor.is_meta:
                _fail(fault)
            yield name, tensor

    return original(model, watched(), *args, **kwargs)


def _process(original: Callable[..., Any], method: Any, layer: Any) -> Any:
    if (fault := _fault()).get("process"):
        _fail(fault)
    return original(method, layer)


def _forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    time.sleep(_fault().get("slow", 0))
    return original(*args, **kwargs)
