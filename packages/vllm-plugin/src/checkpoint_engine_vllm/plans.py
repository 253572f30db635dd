"""Which reload a model's next update takes: vLLM's loader, the one that proves a plan, or the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint_engine.sdk import ReloadMode, TensorSpec
from checkpoint_engine.sdk.plans import KeptProofs, Ladder, Rung, without_functions
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layers
from checkpoint_engine_vllm.loadplan import LoadPlan
from checkpoint_engine_vllm.planned import PlannedReload
from checkpoint_engine_vllm.protocols import ModelConfig
from checkpoint_engine_vllm.proving import ProvingReload
from checkpoint_engine_vllm.reload import LayerwiseReload
from checkpoint_engine_vllm.repairs import Repairs

__all__ = ["AnyReload", "LayersLadder", "open_reload"]

AnyReload = LayerwiseReload | PlannedReload


class LayersLadder(Ladder[Layers]):
    """For one model of a worker, of any name. A proof is of the plan, and of the way of each layer."""

    def __init__(self, model: str, kept: Callable[[], KeptProofs | None] | None = None) -> None:
        super().__init__("vLLM's loader", model, kept)

    def digest_of(self, layers: Layers) -> str:
        """See `Ladder`."""
        return layers.digest

    def recall(self, layers: Layers, is_proved: Callable[[str], bool]) -> bool:
        """See `Ladder`."""
        return layers.recall(is_proved)


def open_reload(
    ladder: LayersLadder,
    mode: ReloadMode,
    plan: LoadPlan | None,
    model: torch.nn.Module,
    model_config: ModelConfig,
    repairs: Repairs,
    shared: frozenset[torch.nn.Module] = frozenset(),
    obstacle: str = "",
    tensors: Mapping[str, TensorSpec] | None = None,
    only: Sequence[torch.nn.Module] | None = None,
    *,
    compared: bool = False,
) -> AnyReload:
    """The reload of `model` for one update.

    Args:
        ladder: How far its plan has come.
        mode: How it is to be taken over.
        plan: What vLLM's loader would do; None if that is unknown.
        model: What takes the weights.
        model_config: Its configuration.
        repairs: What vLLM forgets.
        shared: Modules of another model, whose reload fills them.
        obstacle: Why the plan cannot be used.
        compared: Whether what copies bring is compared although they are trusted.
        tensors: What comes, if other processes may learn that the plan was proved, and this one from them.
        only: Modules that nothing else than which may change, all others being in `shared`; all if None.

    Raises:
        WeightsRejectedError: nothing but the plan may be used, and it does not cover the whole model.
    """
    layers = None
    if mode != "loader" and plan is not None and plan.is_complete:
        known = plan  # what is recorded is this one
        layers = ladder.layers_for(_bindings(plan, model, shared), lambda: Layers(known, model, shared), tensors)
    rung = ladder.begin(mode, layers, obstacle=obstacle or "its loader cannot be run without data", compared=compared)
    if layers is None or rung is Rung.LOADER:
        return LayerwiseReload(model, model_config, repairs, shared, only, plan=plan)
    if rung is Rung.PROOF:
        return ProvingReload(model, model_config, repairs, shared, ladder, layers, only)
    return PlannedReload(model, model_config, repairs, shared, ladder, layers, only)


def _bindings(plan: LoadPlan, model: torch.nn.Module, shared: frozenset[torch.nn.Module]) -> tuple[object, ...]:
    """All that a plan rests on: the tensors that come, vLLM, and where the model's own parameters lie and how."""
    with without_functions():  # this is gone through in every update
        return (
            plan.key,
            compat.version(),
            id(model),
            *(
                (target, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                for prefix, module in compat.modules_by_name(model).items()
                if module not in shared
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
                if (target := f"{prefix}.{name}" if prefix else name) in plan.targets
            ),
        )
