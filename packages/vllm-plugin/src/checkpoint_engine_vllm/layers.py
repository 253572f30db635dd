"""How each layer of a model takes its weights, and what an update by plan looks up.

- `IN_PLACE`: copies go straight into its parameters, because vLLM leaves them as the checkpoint has them.
- `REBUILT`: copies go into fresh memory laid out as in the checkpoint, which vLLM then processes (packs, quantises,
  transposes) and puts where the parameters are.
- `LOADER`: vLLM's own loader does everything.
"""

from __future__ import annotations

import enum
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations

import torch

from checkpoint_engine.sdk import WorkerError
from checkpoint_engine.sdk.plans import Parting, Reached, ReloadPlan, Replay, switches_of
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.loadplan import LoadPlan
from checkpoint_engine_vllm.reaching import reach_weights

__all__ = ["Layer", "LayerRoutes", "Layers", "Way"]


_MOST_KINDS = 8
"""Of processed layers, of which each may have been found to need rebuilding or not, so that two to this power of
digests are looked up. A mixture of experts has six."""

_VERSIONED = ("vllm", "torch", "transformers")
"""Packages whose code is known by their versions, which proofs are kept under."""


class Way(enum.Enum):
    """See the top of this file."""

    IN_PLACE = "in place"
    REBUILT = "rebuilt"
    LOADER = "loader"


@dataclass
class Layer:
    """A module that takes weights by itself."""

    name: str
    module: torch.nn.Module
    targets: dict[str, str] = field(default_factory=dict[str, str])
    """Names of parameters and buffers: in the plan -> in the module."""
    way: Way = Way.IN_PLACE
    reason: str = ""
    """Why it is left to vLLM's loader."""

    def tensor(self, target: str) -> torch.Tensor | None:
        """A parameter or buffer as it is now."""
        own = self.targets[target]
        found = dict(self.module.named_parameters(recurse=False, remove_duplicate=False)).get(own)
        if found is None:
            found = dict(self.module.named_buffers(recurse=False, remove_duplicate=False)).get(own)
        return None if found is None else found.data

    @property
    def processed_as(self) -> str:
        """What makes something of its weights once they are loaded; empty if nothing does."""
        method = getattr(self.module, "quant_method", None)
        return _kind_of(self.module) if hasattr(method, "process_weights_after_loading") else ""

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
    """All layers that an update fills, and the tensors that each way of filling them needs; see `PlannedLayers`."""

    def __init__(self, plan: LoadPlan, model: torch.nn.Module, shared: Collection[torch.nn.Module] = ()) -> None:
        """Decides on a way for each layer, as far as that can be told without any weights.

        Layers in `shared` are filled with another model.
        """
        self.load_plan = plan
        self._model = model
        self._shared = shared
        self.device = next(model.parameters()).device
        """Where the model lies."""
        self.layers: dict[str, Layer] = {}
        self.obstacle = ""
        """Why none of this can be used: the served model is not built like the one without data."""
        self.tried = False
        """Whether an update has changed weights while all that the model holds was compared, here or elsewhere."""
        if plan.beside:
            self.obstacle = f"its loader fills {min(plan.beside)}, which is neither a parameter nor a buffer"
            return
        self._modules = modules = compat.modules_by_name(model)
        for target in plan.reload.targets:
            name, _, own = target.rpartition(".")
            if name not in modules:
                self.obstacle = f"the served model has no {name}"
                return
            if modules[name] in shared:
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

    @property
    def plan(self) -> ReloadPlan:
        """The copies that vLLM's loader comes down to."""
        return self.load_plan.reload

    @property
    def targets(self) -> set[str]:
        """What copies fill."""
        return {target for layer in self if layer.way is not Way.LOADER for target in layer.targets}

    def left_to_loader(self) -> Mapping[str, str]:
        """Layers that only vLLM's loader can fill, and why."""
        return {layer.name: layer.reason for layer in self.of(Way.LOADER)}

    def leave(self, differing: Mapping[str, str]) -> None:
        """Leaves the layers of these targets to the loader, which put something else there than the tensors named."""
        for layer in self:
            found = [target for target in layer.targets if target in differing]
            if found:
                layer.leave_to_loader(f"vLLM's loader put something else than {differing[found[0]]!r} into it")

    def leave_what_no_copy_reaches(self, changed: Iterable[Reached]) -> list[str]:
        """Leaves to vLLM's loader what it changed and copies would not; what is no layer's, with the whole model.

        Args:
            changed: What is not as it was before an update by the loader; the ways of all layers are decided.

        Returns:
            What they are called.
        """
        memory = {_address(each.tensor) for each in reach_weights(self._model) if self._is_reached(each)} - {0}
        missed = [each for each in changed if not self._is_reached(each) and _address(each.tensor) not in memory]
        for each in missed:
            why = f"vLLM's loader changes {each.path} too, which no copy reaches"
            if each.module in self.layers:
                self.layers[each.module].leave_to_loader(why)
            else:
                self.obstacle = why
        return [each.path for each in missed]

    def _is_reached(self, each: Reached) -> bool:
        """Whether an update by plan copies it, or has vLLM make it anew."""
        layer, module = self.layers.get(each.module), self._modules[each.module]
        if each.path in self.load_plan.aliases or module in self._shared or compat.is_attention(module):
            return True
        return layer is not None and (layer.way is not Way.IN_PLACE or each.path in layer.targets)

    @property
    def digest(self) -> str:
        """Stands for the plan, what the model is built of, and the way of each layer.

        Empty where the plan is not all of it: what a loader does besides has to be seen by each process for itself. And
        where an update has brought nothing new, so that nobody knows what else would have changed.
        """
        if not self.tried or not self._says_all:
            return ""
        return self._digest(layer.name for layer in self.of(Way.IN_PLACE))

    def recall(self, is_proved: Callable[[str], bool]) -> bool:
        """Takes over the ways that a proof of another process was of, if `is_proved` knows of one by its digest.

        Whether vLLM's processing changes a layer that looks as it was loaded only shows while it runs: the proof may be
        of such a layer in place, or rebuilt. So it is asked for with each kind of them in place, and rebuilt.
        """
        if not self._says_all or not self._is_noted():
            return False
        in_place = self.of(Way.IN_PLACE)
        kinds = sorted({layer.processed_as for layer in in_place} - {""})[:_MOST_KINDS]
        for rebuilt in chain.from_iterable(combinations(kinds, count) for count in range(len(kinds) + 1)):
            if is_proved(self._digest(layer.name for layer in in_place if layer.processed_as not in rebuilt)):
                for layer in in_place:
                    if layer.processed_as in rebuilt:
                        self.rebuild(layer)
                self.settle()
                self.tried = True
                return not self.of(Way.LOADER)
        return False

    @property
    def _says_all(self) -> bool:
        """Whether versions, plan and ways say all of what an update does."""
        if self.obstacle or self.of(Way.LOADER):
            return False
        return all(package in _VERSIONED for module in self._modules.values() for package in _packages_of(module))

    def _digest(self, in_place: Iterable[str]) -> str:
        return hashlib.sha256("\n".join((self._built, *sorted(in_place))).encode()).hexdigest()

    @cached_property
    def _built(self) -> str:
        """Stands for the plan and the served model, before any update: its layers, and how their tensors lie."""
        kinds = [(name, _kind_of(module)) for name, module in self._modules.items()]
        layouts = [(target, _layout(layer.tensor(target))) for layer in self for target in layer.targets]
        return hashlib.sha256(repr((self.plan.digest, kinds, sorted(layouts))).encode()).hexdigest()

    def _is_noted(self) -> bool:
        """Whether the layers hold all flags and numbers that vLLM's loader would set: copies set none."""
        held = switches_of(self._model) if self.load_plan.noted else {}
        return all(held.get(name) == value for name, value in self.load_plan.noted.items())

    @cached_property
    def routes(self) -> LayerRoutes:
        """What an update by plan looks up; asked for once the ways of all layers are decided."""
        return LayerRoutes(self, self._model, self._shared)

    def settle(self) -> None:
        """Leaves to the loader what shares a tensor with a layer that is left to it: it would fill both."""
        while True:
            loaded = self.tensors_of(Way.LOADER)
            found = [layer for layer in self if layer.way is not Way.LOADER and self._sources(layer) & loaded]
            if not found:
                break
            for layer in found:
                layer.leave_to_loader(f"shares {min(self._sources(layer) & loaded)!r} with such a layer")
        left = self.left_to_loader()
        if left and self.load_plan.at_once:
            name, why = next(iter(left.items()))
            self.obstacle = f"its loader must get all tensors in one call, and {name} needs it ({why})"

    def tensors_of(self, *ways: Way) -> set[str]:
        """Tensors that layers of these ways need."""
        return {name for layer in self if layer.way in ways for name in self._sources(layer)}

    def obstacle_to_rebuilding(self, layer: Layer) -> str:
        """Says what keeps a layer from being rebuilt; empty if nothing does."""
        parameters, buffers = compat.layerwise().info(layer.module).restore_metadata
        lasting = sorted(buffers.keys() - compat.own_constants(layer.module))
        if lasting:
            return f"has buffers of its own ({', '.join(lasting)})"
        own = set(layer.targets.values())
        unfilled = [name for name in parameters if name not in own]
        missing = [name for name in unfilled if f"{layer.name}.{name}" not in self.load_plan.computed]
        if missing:
            aliases = self._aliases(layer)
            missing = [name for name in missing if name not in aliases]
        if missing:
            return f"gets nothing for {', '.join(missing)}"
        for target, name in layer.targets.items():
            expected = parameters.get(name, layer.tensor(target))
            if expected is None or not _same_layout(expected, self.load_plan.targets[target]):
                return f"has {name} in another shape than its loader expects"
        return ""

    def _choose(self, layer: Layer) -> None:
        flaws = {target: self.plan.flaws[target] for target in layer.targets if target in self.plan.flaws}
        if flaws:
            target, reason = next(iter(flaws.items()))
            layer.leave_to_loader(f"{layer.targets[target]}: {reason}")
        elif compat.is_attention(layer.module):
            layer.leave_to_loader("attention scales")
        elif not all(_same_layout(layer.tensor(target), self.load_plan.targets[target]) for target in layer.targets):
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
        return {name for target in layer.targets for name in self.plan.recording.origins.get(target, ())}

    def _aliases(self, layer: Layer) -> set[str]:
        """Parameters of a layer that are another layer's as well: those are filled there. Looks through all layers."""
        return {
            name
            for name, parameter in layer.module.named_parameters(recurse=False, remove_duplicate=False)
            if any(parameter is other for each in self if each is not layer for other in each.module.parameters())
        }


def _kind_of(module: torch.nn.Module) -> str:
    """Its class, and the classes of what processes its weights."""
    return " ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in _classes_of(module))


def _packages_of(module: torch.nn.Module) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in _classes_of(module)}


def _classes_of(module: torch.nn.Module) -> list[type]:
    method = getattr(module, "quant_method", None)
    parts = (module, method, getattr(module, "scheme", None), getattr(method, "scheme", None))
    return [type(part) for part in parts if part is not None]


def _layout(tensor: torch.Tensor | None) -> str:
    return "" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"


def _same_layout(tensor: torch.Tensor | None, planned: torch.Tensor) -> bool:
    return (
        tensor is not None
        and tensor.dtype == planned.dtype
        and tensor.shape == planned.shape
        and tensor.stride() == planned.stride()
    )


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.layout != torch.strided or tensor.is_meta else tensor.untyped_storage().data_ptr()


class LayerRoutes:
    """What an update by plan looks up."""

    def __init__(self, layers: Layers, model: torch.nn.Module, shared: Collection[torch.nn.Module]) -> None:
        """Works it out for `model`, apart from modules in `shared`, which are another model's."""
        self.planned = layers.targets
        """What is filled by plan."""
        self.in_place = layers.tensors_of(Way.IN_PLACE)
        self.by_loader = layers.tensors_of(Way.LOADER)
        rebuilt = {target: layer for layer in layers.of(Way.REBUILT) for target in layer.targets}
        self.rebuilt: dict[str, list[Layer]] = {}
        """Tensor -> the layers to be rebuilt that it has pieces for, once for each piece."""
        for name, pieces in layers.plan.pieces.items():
            found = [rebuilt[piece.target] for piece in pieces if piece.target in rebuilt]
            if found:
                self.rebuilt[name] = found
        self.pieces = Counter(layer.name for found in self.rebuilt.values() for layer in found)
        """How many pieces a layer to be rebuilt waits for."""
        shapes = layers.load_plan.targets
        self.parting = Parting(
            {name: {layer.name for layer in found} for name, found in self.rebuilt.items()},
            {layer.name: sum(shapes[target].nbytes for target in layer.targets) for layer in rebuilt.values()},
        )
        others = {id(layer.module) for layer in layers.of(Way.LOADER)}
        self.attention = [
            module
            for module in model.modules()
            if compat.is_attention(module) and module not in shared and id(module) not in others
        ]
        """Attention layers that no loader completes."""
        fixed = {
            target: tensor
            for layer in layers.of(Way.IN_PLACE)
            for target in layer.targets
            if (tensor := layer.tensor(target)) is not None
        }
        self.replay = Replay(layers.plan, fixed, set(rebuilt))
