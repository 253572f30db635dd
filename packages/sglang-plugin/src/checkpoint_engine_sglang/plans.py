"""What is known of a worker's models from one update to the next: where tensors go, and how far to trust that."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine.reload.proof import Proof
from checkpoint_engine.reload.reloader import Trust
from checkpoint_engine.reload.replay import Replay
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.layouts import Layout, layouts_of
from checkpoint_engine_sglang.trial import Trial, digest, try_out

_NO_PLAN = (
    "reload by plan was asked for and is not possible; use --reload auto, which leaves the rest to SGLang's loader"
)


class Model:
    """One model of a worker."""

    def __init__(self, runner: Runner, key: str, trial: Trial | None) -> None:
        self.runner = runner
        self.key = key
        self.trial = trial
        self.trust = Trust.RECORDED
        self.rebuilt = {} if compat.is_reloading_by_itself(runner.model) else _find_rebuilt(runner.model)
        """Name of a layer -> module and first layout, of those that are processed anew after each update."""
        self.targets: set[str] = set()
        """What copies fill."""
        self.tensors: set[str] = set()
        """Those that need no loader."""
        self.loaded: set[str] = set()
        """Those that do; the others are another worker's, or for nothing."""
        self._replay: Replay | None = None
        self._places: tuple[object, ...] = ()
        self._wrong: set[str] = set()

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
        layouts = layouts_of(self.runner.model)
        for name, module, _ in compat.processed_modules(self.runner.model):
            if name in layers and name in layouts:
                self.rebuilt[name] = (module, layouts[name])

    def prepare(self, mode: str) -> None:
        """Finds out how far the plan reaches.

        Raises:
            WeightsRejectedError: nothing but the plan may be used, and it does not cover everything.
        """
        trial = self.trial
        if trial is None or mode == "loader":
            if mode == "plan":
                raise WeightsRejectedError(f"{_NO_PLAN} (the loader of the {self.runner.role} model needs data)")
            self.targets, self.tensors = set(), set()
            return
        flaws = self.flaws()
        if mode == "plan" and flaws:
            name, reason = next(iter(flaws.items()))
            raise WeightsRejectedError(f"{_NO_PLAN} ({name} of the {self.runner.role} model: {reason})")
        self.targets, self.tensors = trial.plan.covered(trial.plan.targets - flaws.keys())
        self.loaded = (trial.placed | trial.plan.loader_only.keys()) - self.tensors

    def flaws(self) -> dict[str, str]:
        """Targets and tensors that only the loader can deal with, and why."""
        if self.trial is None:
            return {}
        plan = self.trial.plan
        found = {**plan.loader_only, **plan.flaws, **dict.fromkeys(self._wrong, "its loader put something else there")}
        for target in plan.targets - found.keys():
            tensor, planned = (None, None) if self.layer_of(target) else (self.live(target), self.trial.targets[target])
            if planned is not None and not _same_layout(tensor, planned):
                found[target] = "it is not as its loader expects"
        return found

    def replay(self) -> Replay:
        """The copies, ready for where the parameters are now."""
        plan = None if self.trial is None else self.trial.plan
        if plan is None:
            raise WeightsRejectedError(_NO_PLAN)
        moving = {target for target in self.targets if self.layer_of(target)}
        fixed = {target: tensor for target in self.targets - moving if (tensor := self.live(target)) is not None}
        places = (frozenset(moving), *((name, tensor.data_ptr()) for name, tensor in sorted(fixed.items())))
        if self._replay is None or places != self._places:
            self._replay, self._places = Replay(plan, fixed, moving), places
        return self._replay

    def proof(self) -> Proof | None:
        """For comparing what copies do; None where that was done."""
        if self.trial is None or not self.targets or self.trust >= Trust.CHECKED:
            return None
        return Proof(self.trial.plan, self.runner.device)

    def succeeded(self, wrong: Mapping[str, str]) -> None:
        """An update is complete in which all copies were compared, and these came out otherwise."""
        self._wrong |= wrong.keys()
        self.trust = Trust(min(self.trust + 1, Trust.CHECKED))


class Plans:
    """Of all models of a worker. What failed is forgotten."""

    def __init__(self) -> None:
        self._known: dict[str, Model] = {}

    def of(self, runner: Runner, tensors: Mapping[str, TensorSpec]) -> Model:
        """What is known of a model; the next update mostly brings the same tensors.

        Raises:
            WeightsRejectedError: its loader does not take a tensor, or not in this shape.
        """
        key, known = digest(tensors), self._known.pop(runner.role, None)
        if known is None or known.key != key or known.runner.model is not runner.model:
            known = Model(runner, key, try_out(runner, tensors))
        self._known[runner.role] = known
        return known

    def forget(self) -> None:
        """An update broke off."""
        self._known.clear()


def _find_rebuilt(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, Layout]]:
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
