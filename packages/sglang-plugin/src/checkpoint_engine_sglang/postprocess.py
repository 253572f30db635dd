"""What SGLang does to weights after it has loaded them, and which layers it cannot do it to a second time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import torch

from checkpoint_engine.errors import WorkerError
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner

QUANTISED = "CHECKPOINT_ENGINE_SGLANG_QUANTISED"
"""Environment variable: `1` updates quantised layers that are not known to survive it."""

_MOST_NAMED = 4


def prepare(runner: Runner) -> None:
    """Puts weights that SGLang has packed back into the layout that its loader fills, where it can (0.5.21 on).

    Raises:
        WorkerError: a layer fails.
    """
    for name, module, method in _methods(runner.model):
        restore = getattr(method, "restore_weights_before_loading", None)
        if restore is not None:
            _run(restore, name, module, runner, "its weights cannot be made ready to be loaded again")


def complete(runner: Runner) -> None:
    """Derives what the model computes from its weights, and packs or quantises them as after the first load.

    Raises:
        WorkerError: the model or a layer fails.
    """
    derive = getattr(runner.model, "post_load_weights", None)
    if derive is not None:
        try:
            derive()
        except Exception as error:
            raise WorkerError(
                f"the {runner.role} model failed to derive what it computes from its weights: "
                f"{type(error).__name__}: {error}"
            ) from error
    if compat.is_reloading_by_itself(runner.model):
        return
    for name, module, method in _methods(runner.model):
        process = getattr(method, "process_weights_after_loading", None)
        if process is not None:
            _run(process, name, module, runner, "its weights were loaded but cannot be processed")


def find_unsafe(runner: Runner) -> str:
    """The layers whose weights cannot be replaced, and why; empty if there are none, or the user takes the risk."""
    if os.environ.get(QUANTISED) == "1" or compat.is_reloading_by_itself(runner.model):
        return ""
    found: dict[str, list[str]] = {}
    for name, module, method in _methods(runner.model):
        reason = _why_unsafe(module, method)
        if reason:
            found.setdefault(reason, []).append(name)
    return "; ".join(
        f"{reason}: {', '.join(names[:_MOST_NAMED])}"
        + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
        for reason, names in found.items()
    )


def is_quantised(runner: Runner) -> bool:
    """Whether any layer holds something else than what the checkpoint of its kind has in 16 bits."""
    return any(not _is_unquantised(method) for _, _, method in _methods(runner.model))


def _why_unsafe(module: torch.nn.Module, method: object) -> str:
    kind = type(method).__name__
    if getattr(module, "use_intel_amx_backend", False):
        return f"{kind} has packed the weights for the CPU's AMX, which cannot be undone"
    if _is_unquantised(method) or "KVCache" in kind:
        return ""
    if getattr(getattr(module, "weight_scale_inv", None), "format_ue8m0", False):
        return f"{kind} has turned the scales into powers of two, and would take new ones for such"
    parameters = [parameter for _, parameter in module.named_parameters(recurse=False)]
    if parameters and all(hasattr(parameter, "weight_loader") for parameter in parameters) and kind.startswith("Fp8"):
        return ""
    return f"{kind} keeps weights in another layout than the checkpoint's"


def _is_unquantised(method: object) -> bool:
    return type(method).__name__.startswith("Unquantized")


def _methods(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    for name, module in compat.named_modules(model):
        method = cast("Any", getattr(module, "quant_method", None))
        if method is not None and not compat.is_lora_wrapper(module):
            yield name, module, method


def _run(step: Any, name: str, module: torch.nn.Module, runner: Runner, problem: str) -> None:  # noqa: ANN401
    try:
        with compat.loading_context(module, runner.device):
            step(module)
    except Exception as error:
        raise WorkerError(
            f"layer {name} of the {runner.role} model: {problem}: {type(error).__name__}: {error}"
        ) from error
