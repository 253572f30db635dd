"""Which reload a model's next update takes: vLLM's loader, the one that proves a plan, or the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine.reload.overheads import without_functions
from checkpoint_engine.reload.reloader import Trust
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layers, Way
from checkpoint_engine_vllm.loadplan import LoadPlan
from checkpoint_engine_vllm.planned import PlannedReload
from checkpoint_engine_vllm.protocols import ModelConfig
from checkpoint_engine_vllm.proving import ProvingReload
from checkpoint_engine_vllm.reload import Reload
from checkpoint_engine_vllm.repairs import Repairs
from checkpoint_engine_vllm.routes import Routes

AnyReload = Reload | ProvingReload | PlannedReload


@dataclass
class _Known:
    layers: Layers
    bindings: tuple[object, ...]
    trust: Trust
    routes: Routes | None = None


class Plans:
    """The plans of a worker's models. A plan that failed, or whose model has changed, is forgotten."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def open(
        self,
        name: str,
        mode: str,
        plan: LoadPlan | None,
        model: torch.nn.Module,
        model_config: ModelConfig,
        repairs: Repairs,
        lent: frozenset[torch.nn.Module] = frozenset(),
    ) -> AnyReload:
        """The reload of `model` for one update.

        Args:
            name: Any name for the model.
            mode: `auto`, `plan` (nothing may be left to the loader once the plan is proved) or `loader`.
            plan: What vLLM's loader would do; None if that is unknown.
            model: What takes the weights.
            model_config: Its configuration.
            repairs: What vLLM forgets.
            lent: Modules of another model, whose reload fills them.

        Raises:
            WeightsRejectedError: `plan` was asked for, and it does not cover the whole model.
        """
        reload = Reload(model, model_config, repairs, lent)
        if mode == "loader":
            return reload
        if plan is None or not plan.is_complete:
            self._known.pop(name, None)
            if mode == "plan":
                raise WeightsRejectedError(f"{_NO_PLAN} (the loader of the {name} model cannot be run without data)")
            return reload
        bindings = _bindings(plan, model, lent)
        known = self._known.get(name)
        if known is None or known.bindings != bindings:
            known = self._known[name] = _Known(Layers(plan, model, lent), bindings, Trust.RECORDED)
        left = known.layers.of(Way.LOADER)
        if mode == "plan" and known.layers.obstacle:
            raise WeightsRejectedError(f"{_NO_PLAN} ({known.layers.obstacle})")
        if mode == "plan" and left:
            raise WeightsRejectedError(f"{_NO_PLAN} (layer {left[0].name!r} of the {name} model: {left[0].reason})")
        if known.layers.obstacle or len(left) == len(known.layers.layers):
            return reload
        if known.trust is Trust.RECORDED:
            return ProvingReload(reload, known.layers)
        if known.routes is None:
            known.routes = Routes(known.layers, model, lent)
        checked = known.trust < Trust.CHECKED
        return PlannedReload(model, model_config, repairs, known.routes, lent=lent, checked=checked)

    def succeeded(self, name: str) -> None:
        """The update that took the last reload of this name is complete."""
        known = self._known.get(name)
        if known is not None:
            known.trust = Trust(min(known.trust + 1, Trust.CHECKED))

    def failed(self, name: str) -> None:
        """That update broke off: whatever was learned of this model is learned anew."""
        self._known.pop(name, None)

    def layers(self, name: str) -> Layers | None:
        """The layers of a model that has a plan."""
        known = self._known.get(name)
        return None if known is None else known.layers


_NO_PLAN = "reload by plan was asked for and is not possible; use --reload auto, which leaves the rest to vLLM's loader"


def _bindings(plan: LoadPlan, model: torch.nn.Module, lent: frozenset[torch.nn.Module]) -> tuple[object, ...]:
    """All that a plan rests on: the tensors that come, vLLM, and where the model's own parameters lie and how."""
    with without_functions():  # this is gone through in every update
        return (
            plan.key,
            compat.version(),
            id(model),
            *(
                (target, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                for prefix, module in compat.modules_by_name(model).items()
                if module not in lent
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
                if (target := f"{prefix}.{name}" if prefix else name) in plan.targets
            ),
        )
