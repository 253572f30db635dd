"""What is known of a worker's model from one update to the next: where tensors go, and what copies can fill."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from checkpoint_engine.sdk import TensorSpec
from checkpoint_engine.sdk.fit import fingerprint
from checkpoint_engine.sdk.plans import Ladder, Parting, ReloadPlan, Replay
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.dry_run import DryRun, run_dry
from checkpoint_engine_sglang.layouts import LayerLayout, layout_of, layouts_of

__all__ = ["ModelLadder", "PlannedModel", "inverted"]


class PlannedModel:
    """One model of a worker; see `checkpoint_engine.reload.ladder.PlannedLayers`."""

    def __init__(self, runner: Runner, dry_run: DryRun) -> None:
        self.runner = runner
        self.dry_run = dry_run
        self.rebuilt = {} if compat.is_reloading_by_itself(runner.model) else _find_rebuilt(runner.model)
        """Name of a layer -> module and first layout, of those that are processed anew after each update."""
        self.targets: set[str] = set()
        """What copies fill."""
        self.tensors: set[str] = set()
        """Those that need no loader."""
        self.loaded: set[str] = set()
        """Those that do; the others are another worker's, or for nothing."""
        self._left: dict[str, str] = {}
        self._wrong: set[str] = set()
        self._too_large: list[str] | None = None
        self._replay: Replay | None = None
        self._parting: Parting | None = None
        self._addresses: tuple[object, ...] = ()
        self.settle()

    @property
    def plan(self) -> ReloadPlan:
        """The copies that its loader comes down to."""
        return self.dry_run.plan

    @property
    def origins(self) -> Mapping[str, set[str]]:
        """Parameter or buffer -> every tensor that something in it comes from."""
        return self.plan.recording.origins

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.runner.device

    @property
    def obstacle(self) -> str:
        """Why no plan can be used: copies derive nothing, and what a loader derives itself only it can bring about."""
        derived, whole, role = self.dry_run.derived, self.dry_run.whole, self.runner.role
        if whole and self._left:
            left = next(iter(self._left.items()))
            return (
                f"the loader of the {role} model takes all tensors or none ({whole}), and it must do {': '.join(left)}"
            )
        if not derived:
            return self.dry_run.obstacle
        return f"the loader of the {role} model derives {derived[0]} from its weights itself, which no plan does"

    @property
    def is_fed_whole(self) -> bool:
        """Whether its loader must be called once, with all tensors: it wants that, or it is not known what it does."""
        return bool(self.dry_run.whole or self.dry_run.obstacle or self.dry_run.derived)

    def settle(self) -> None:
        """Finds out how far the plan reaches; an update may have left something in another layout."""
        plan, self._parting = self.plan, None
        self._left = {
            **plan.loader_only,
            **plan.flaws,
            **dict.fromkeys(self._wrong, "its loader put something else there"),
        }
        for target in plan.targets - self._left.keys():
            if not self.layer_of(target) and not _same_layout(self.live(target), self.dry_run.targets[target]):
                self._left[target] = "it is not as its loader expects"
        self.targets, self.tensors = plan.covered(plan.targets - self._left.keys())
        self.loaded = (self.dry_run.placed | plan.loader_only.keys()) - self.tensors

    def left_to_loader(self) -> Mapping[str, str]:
        """Targets and tensors that only the loader can deal with, and why."""
        return self._left

    def leave(self, differing: Mapping[str, str]) -> None:
        """Leaves targets to the loader, from the next update on."""
        self._wrong |= differing.keys()

    def layer_of(self, target: str) -> str:
        """The layer to be rebuilt that a parameter or buffer belongs to; empty if it stays where it is."""
        layer = target.rpartition(".")[0]
        return layer if layer in self.rebuilt else ""

    def live(self, target: str) -> torch.Tensor | None:
        """A parameter or buffer that stays where it is."""
        layer, _, own = target.rpartition(".")
        return compat.own_tensor(self.runner.model.get_submodule(layer), own)

    def rebuild_too(self, layers: Collection[str]) -> None:
        """Counts these among the layers to be rebuilt, though SGLang leaves their weights as they come."""
        layouts, self._parting = layouts_of(self.runner.model), None
        for name in layers:
            module = self.runner.model.get_submodule(name)
            if name in layouts or compat.processing_of(module) is None:
                self.rebuilt[name] = (module, layouts.get(name) or layout_of(module))

    def too_large(self, tensors: Mapping[str, TensorSpec], tensor_parallel_size: int) -> list[str]:
        """See `DryRun.too_large`; worked out once."""
        if self._too_large is None:
            self._too_large = self.dry_run.too_large(tensors, self.runner, tensor_parallel_size)
        return self._too_large

    def sources(self) -> dict[str, set[str]]:
        """Layer to be rebuilt -> tensors that it comes from."""
        found: dict[str, set[str]] = {}
        for target, names in self.origins.items():
            layer = self.layer_of(target)
            if layer and names:
                found.setdefault(layer, set()).update(names)
        return found

    def parting(self) -> Parting:
        """Cuts what comes at once, so that few layers to be rebuilt are open at a time."""
        if self._parting is None:
            sizes = {name: sum(slot.nbytes for _, slot in layout.slots) for name, (_, layout) in self.rebuilt.items()}
            self._parting = Parting(inverted(self.sources()), sizes)
        return self._parting

    def replay(self) -> Replay:
        """The copies, ready for where the parameters are now."""
        moving = {target for target in self.targets if self.layer_of(target)}
        fixed = {target: tensor for target in self.targets - moving if (tensor := self.live(target)) is not None}
        addresses = (frozenset(moving), *((name, tensor.data_ptr()) for name, tensor in sorted(fixed.items())))
        if self._replay is None or addresses != self._addresses:
            self._replay, self._addresses = Replay(self.plan, fixed, moving), addresses
        return self._replay


def inverted(found: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Name -> the others that are found for it, the other way round."""
    inverse: dict[str, set[str]] = {}
    for name, others in found.items():
        for other in others:
            inverse.setdefault(other, set()).add(name)
    return inverse


class ModelLadder(Ladder[PlannedModel]):
    """How far the plan of one model has come; lives as long as the worker."""

    def model_for(self, runner: Runner, tensors: Mapping[str, TensorSpec]) -> PlannedModel:
        """What is known of the model; the next update mostly brings the same tensors, to the same places.

        Raises:
            WeightsRejectedError: its loader does not take a tensor, or not in this shape.
        """
        # Some loaders remove layers once they are done with them, and cannot run again.
        names = frozenset(dict(runner.model.named_parameters()))
        key = (fingerprint(tensors), runner.model, names, compat.expert_placement())
        model = self.layers_for(key, lambda: PlannedModel(runner, run_dry(runner, tensors)), tensors)
        if self.proved_elsewhere and model.dry_run.switches:
            self.distrust()
        model.settle()
        return model


def _find_rebuilt(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, LayerLayout]]:
    layouts = layouts_of(model)
    return {
        name: (module, layouts[name])
        for name, module, method in compat.processed_modules(model)
        if name in layouts and not (compat.is_unquantised(method) and layouts[name].is_kept(module))
    }


def _same_layout(tensor: torch.Tensor | None, planned: torch.Tensor) -> bool:
    return tensor is not None and (tensor.shape, tensor.stride(), tensor.dtype) == (
        planned.shape,
        planned.stride(),
        planned.dtype,
    )
