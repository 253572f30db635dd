"""How each layer of a model takes its weights.

- `DIRECT`: copies go straight into its parameters, because vLLM leaves them as the checkpoint has them.
- `REBUILT`: copies go into fresh memory laid out as in the checkpoint, which vLLM then processes (packs, quantises,
  transposes) and puts where the parameters are.
- `LOADER`: vLLM's own loader does everything.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from checkpoint_engine.errors import WorkerError
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.loadplan import LoadPlan


class Way(enum.Enum):
    """See the top of this file."""

    DIRECT = "direct"
    REBUILT = "rebuilt"
    LOADER = "loader"


@dataclass
class Layer:
    """A module that takes weights by itself."""

    name: str
    module: torch.nn.Module
    targets: dict[str, str] = field(default_factory=dict[str, str])
    """Names of parameters and buffers: in the plan -> in the module."""
    way: Way = Way.DIRECT
    reason: str = ""
    """Why it is left to vLLM's loader."""

    def tensor(self, target: str) -> torch.Tensor | None:
        """A parameter or buffer as it is now."""
        own = self.targets[target]
        found = dict(self.module.named_parameters(recurse=False, remove_duplicate=False)).get(own)
        if found is None:
            found = dict(self.module.named_buffers(recurse=False, remove_duplicate=False)).get(own)
        return None if found is None else found.data

    def process(self) -> None:
        """Has vLLM process its weights, which are all there, and put the result where its parameters were before.

        Raises:
            WorkerError: vLLM fails.
        """
        try:
            compat.layerwise().process(self.module)
        except Exception as error:
            raise WorkerError(f"vLLM could not process layer {self.name!r}: {type(error).__name__}: {error}") from error

    def leave_to_loader(self, reason: str) -> None:
        """Gives up on planning it; the first reason counts."""
        if self.way is not Way.LOADER:
            self.way, self.reason = Way.LOADER, reason


class Layers:
    """All layers that an update fills, and the tensors that each way of filling them needs."""

    def __init__(self, plan: LoadPlan, model: torch.nn.Module, lent: Collection[torch.nn.Module] = ()) -> None:
        """Decides on a way for each layer, as far as that can be told without any weights.

        Layers in `lent` are filled with another model.
        """
        self.plan = plan
        self.device = next(model.parameters()).device
        """Where the model lies."""
        self.layers: dict[str, Layer] = {}
        self.obstacle = ""
        """Why none of this can be used: the served model is not built like the one without data."""
        modules = compat.modules_by_name(model)
        for target in plan.reload.targets:
            name, _, own = target.rpartition(".")
            if name not in modules:
                self.obstacle = f"the served model has no {name}"
                return
            if modules[name] in lent:
                continue
            layer = self.layers.setdefault(name, Layer(name, modules[name]))
            layer.targets[target] = own
        for layer in self:
            self._choose(layer)
            if not all(self._exists(layer, target) for target in layer.targets):
                self.obstacle = f"{layer.name} of the served model is wrapped, or not what its loader expects"
        self._leave_memory_of_two_to_loader()
        self.settle()

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers.values())

    def of(self, way: Way) -> list[Layer]:
        """Layers of one way."""
        return [layer for layer in self if layer.way is way]

    def settle(self) -> None:
        """Leaves to the loader what shares a tensor with a layer that is left to it: it would fill both."""
        while True:
            loaded = self.tensors_of(Way.LOADER)
            found = [layer for layer in self if layer.way is not Way.LOADER and self._sources(layer) & loaded]
            if not found:
                return
            for layer in found:
                layer.leave_to_loader(f"shares {min(self._sources(layer) & loaded)!r} with such a layer")

    def tensors_of(self, *ways: Way) -> set[str]:
        """Tensors that layers of these ways need."""
        return {name for layer in self if layer.way in ways for name in self._sources(layer)}

    def obstacle_to_rebuilding(self, layer: Layer) -> str:
        """Says what keeps a layer from being rebuilt; empty if nothing does."""
        parameters, buffers = compat.layerwise().info(layer.module).restore_metadata
        if buffers:
            return f"has buffers of its own ({', '.join(buffers)})"
        own = set(layer.targets.values())
        others = self._aliases(layer) | {name for name in parameters if f"{layer.name}.{name}" in self.plan.computed}
        missing = [name for name in parameters if name not in own and name not in others]
        if missing:
            return f"gets nothing for {', '.join(missing)}"
        for target, name in layer.targets.items():
            expected = parameters.get(name, layer.tensor(target))
            if expected is None or not _same_layout(expected, self.plan.targets[target]):
                return f"has {name} in another shape than its loader expects"
        return ""

    def _choose(self, layer: Layer) -> None:
        flaws = {target: self.plan.reload.flaws[target] for target in layer.targets if target in self.plan.reload.flaws}
        if flaws:
            target, reason = next(iter(flaws.items()))
            layer.leave_to_loader(f"{layer.targets[target]}: {reason}")
        elif compat.is_attention(layer.module):
            layer.leave_to_loader("attention scales")
        elif not all(_same_layout(layer.tensor(target), self.plan.targets[target]) for target in layer.targets):
            self.rebuild(layer)

    def rebuild(self, layer: Layer) -> None:
        """Has a layer rebuilt, or left to the loader where that cannot be done."""
        layer.way = Way.REBUILT
        obstacle = self.obstacle_to_rebuilding(layer)
        if obstacle:
            layer.leave_to_loader(obstacle)

    def _exists(self, layer: Layer, target: str) -> bool:
        parameters, buffers = compat.layerwise().info(layer.module).restore_metadata
        own = layer.targets[target]
        return own in parameters or own in buffers or layer.tensor(target) is not None

    def _leave_memory_of_two_to_loader(self) -> None:
        """VLLM may have tied parameters after it loaded its first checkpoint."""
        owners: dict[int, tuple[Layer, str]] = {}
        for layer in self:
            for target in layer.targets:
                tensor = layer.tensor(target)
                if tensor is None or tensor.is_meta or not tensor.numel():
                    continue
                other, other_target = owners.setdefault(tensor.data_ptr(), (layer, target))
                if other_target != target:
                    for each in (layer, other):
                        each.leave_to_loader(f"{target} and {other_target} are one in memory")

    def _sources(self, layer: Layer) -> set[str]:
        return {name for target in layer.targets for name in self.plan.reload.recording.origins.get(target, ())}

    def _aliases(self, layer: Layer) -> set[str]:
        """Parameters of a layer that are another layer's as well: those are filled there."""
        return {
            name
            for name, parameter in layer.module.named_parameters(recurse=False, remove_duplicate=False)
            if any(parameter is other for each in self if each is not layer for other in each.module.parameters())
        }


def summary(ways: Mapping[Way, int]) -> str:
    """How much went which way, for people."""
    return ", ".join(f"{nbytes / 1e6:.1f} MB {way.value}" for way, nbytes in ways.items() if nbytes)


def _same_layout(tensor: torch.Tensor | None, planned: torch.Tensor) -> bool:
    return (
        tensor is not None
        and tensor.dtype == planned.dtype
        and tensor.shape == planned.shape
        and tensor.stride() == planned.stride()
    )
