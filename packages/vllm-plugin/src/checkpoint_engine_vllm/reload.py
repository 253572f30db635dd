"""One layerwise reload of one model: vLLM's, with what it lacks.

vLLM keeps references to the tensors of layers that are not complete yet; here they are detached from memory that will
be used again. vLLM cannot give a reload up; here the layers that are not complete get their old weights back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.sdk import Tensors, WorkerError
from checkpoint_engine.sdk.plans import give_to_loader, names_of, nbytes_of
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.compat import is_open
from checkpoint_engine_vllm.filling import Filling
from checkpoint_engine_vllm.loadplan import LoadPlan
from checkpoint_engine_vllm.protocols import LayerState, ModelConfig
from checkpoint_engine_vllm.repairs import Repairs

__all__ = ["LayerwiseReload", "is_torn"]

logger = logging.getLogger(__name__)

_SOME, _OTHERS = " (some parts)", " (others of its layer came)"


def is_torn(incomplete: str) -> bool:
    """Whether the layer of something that `LayerwiseReload.incomplete` names got others of its weights."""
    return _SOME in incomplete or _OTHERS in incomplete


class LayerwiseReload:
    """Replaces the weights of one model. Everything here runs inside `compat.engine_context`."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        repairs: Repairs,
        shared: frozenset[torch.nn.Module] = frozenset(),
        only: Sequence[torch.nn.Module] | None = None,
        plan: LoadPlan | None = None,
    ) -> None:
        """Makes the reload of `model`, or of the modules in `only`.

        Modules in `shared` belong to another model, whose reload fills them. `plan` is what vLLM's loader does, as far
        as that is known.

        Raises:
            WeightsRejectedError: vLLM's loader does what its reload would lose.
        """
        self.model = model
        self._scope = model if only is None else compat.Scope(only)
        self._shared = shared
        self._model_config = model_config
        self._layerwise = compat.layerwise()
        self._repairs = repairs
        self._opened: list[tuple[torch.nn.Module, LayerState]] = []
        """Layers that take weights in this reload, and vLLM's state of them."""
        self._written_in_place: list[tuple[LayerState, torch.Tensor, torch.Tensor]] = []
        """State of a layer, a tensor of it that vLLM overwrites while the layer is incomplete, and its old values."""
        mine = frozenset(self._scope.modules()) - shared
        self._filling = Filling((), {}) if plan is None else Filling.for_direct(plan, model, mine)
        self._at_once = plan is not None and plan.at_once
        self._computed_with = frozenset[str]() if plan is None else plan.reload.recording.computed_with
        """Tensors that vLLM's loader computes with: on the host, where it does so when it starts, to the last bit."""
        self._held_back: list[tuple[str, torch.Tensor]] = []
        """In host memory, where vLLM's loader must get all tensors in one call."""
        self.cloned_bytes = 0
        self.read_bytes = 0
        """By copies of a plan: none."""
        self.loader_bytes = 0
        """Of the tensors that were given to vLLM's loader."""

    def begin(self) -> None:
        """Makes the model ready for new weights."""
        already_open = {layer for layer in self._scope.modules() if is_open(self._layerwise.info(layer))}
        self._repairs.before(self._scope)
        compat.compile_for_plain_tensors()
        self._layerwise.initialize(self._scope)
        for layer in self._scope.modules():
            info = self._layerwise.info(layer)
            if layer not in already_open and info.load_numel_total:
                self._opened.append((layer, info))
                self._remember_what_is_written_in_place(layer, info)

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """See `checkpoint_engine.contract.sink.Selective`; vLLM's loader may read anything."""
        del bucket
        return None

    def load(self, tensors: Tensors) -> None:
        """Gives tensors to vLLM's loader; their memory may be used again afterwards.

        Raises:
            WeightsRejectedError: the loader does not know a tensor, or not in this shape.
            WorkerError: the loader failed otherwise.
        """
        if self._at_once:
            self._held_back.extend((name, tensor.to("cpu", copy=True)) for name, tensor in tensors)
            self.cloned_bytes += nbytes_of(tensors)
        else:
            self._give(tensors)

    def _give(self, tensors: Tensors) -> None:
        names = names_of(tensors)
        self._filling.open(names)
        with compat.bucketed_load(), compat.without_adding_up():
            give_to_loader("vLLM's loader", cast("Any", self.model).load_weights, tensors, self._computed_with)
        self._filling.close(names)
        self.loader_bytes += nbytes_of(tensors)
        self._detach({tensor.untyped_storage().data_ptr() for _, tensor in tensors})

    def _give_held_back(self) -> None:
        held, self._held_back = self._held_back, []
        if held:
            self._give(held)

    def incomplete(self) -> list[str]:
        """Parameters that got nothing, or only some of their parts, as far as vLLM's own book-keeping shows."""
        self._give_held_back()
        names = {layer: name for name, layer in compat.modules_by_name(self.model).items()}
        served = {_address(parameter) for parameter in self._finished_parameters()} - {0}
        found: list[str] = []
        for layer, info in self._opened:
            if not is_open(info) or layer in self._shared or compat.is_attention(layer):
                continue
            loaded: dict[str, list[Any]] = {}
            for parameter, arguments in info.loaded_weights:
                loaded.setdefault(parameter, []).append(arguments.arguments)
            shared = {name for name, old in info.kernel_tensors[0].items() if _address(old) in served}
            for parameter, _ in layer.named_parameters(recurse=False):
                if parameter not in loaded and parameter not in shared:
                    found.append(f"{names[layer]}.{parameter}{_OTHERS if loaded else ''}")
                elif parameter in loaded and _lacks_parts(layer, loaded[parameter]):
                    found.append(f"{names[layer]}.{parameter}{_SOME}")
        return found

    def finish(self) -> None:
        """Completes all layers.

        Raises:
            WorkerError: vLLM's loader was not given all that it needs.
        """
        self._give_held_back()
        incomplete = self._filling.incomplete()
        if incomplete:
            raise WorkerError(f"vLLM's loader was not given all tensors of {', '.join(incomplete[:3])}")
        self._layerwise.finalize(self._scope, self._model_config)
        self._repairs.after(self._scope)

    def abort(self) -> bool:
        """Puts the old weights back into layers that are not complete; returns whether those were all."""
        intact = all(is_open(info) for _, info in self._opened)
        for layer in self._scope.modules():
            info = self._layerwise.info(layer)
            if not is_open(info):
                # vLLM 0.16 puts these back into attention layers even if they are complete.
                info.kernel_tensors = _own_tensors(layer)
                continue
            # A layer that was filled in place, without a buffer, cannot be put back.
            intact = intact and not (getattr(info, "runtime_bound", False) and info.load_numel > 0)
            info.loaded_weights.clear()
            info.load_numel = 0
        self._repairs.undo(layer for layer, info in self._opened if not is_open(info))
        for info, tensor, old in self._written_in_place:
            if is_open(info):
                tensor.data.copy_(old)
        self._layerwise.finalize(self._scope, self._model_config)
        return intact

    # -- inside

    def _remember_what_is_written_in_place(self, layer: torch.nn.Module, info: LayerState) -> None:
        """Keeps small tensors that vLLM leaves where they are, such as biases: counting a load overwrites them."""
        if getattr(info, "runtime_bound", False):
            return
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if not tensor.is_meta:
                self._written_in_place.append((info, tensor, tensor.detach().clone()))

    def _detach(self, storages: set[int]) -> None:
        """Clones the tensors that unfinished layers still need, out of the storages given."""
        for _, info in self._opened:
            if is_open(info):
                for _, bound in info.loaded_weights:
                    for key, value in bound.arguments.items():
                        bound.arguments[key] = self._detached(value, storages)

    def _detached(self, value: object, storages: set[int]) -> object:
        if isinstance(value, torch.Tensor):
            if value.is_meta or not value.numel() or value.untyped_storage().data_ptr() not in storages:
                return value
            self.cloned_bytes += value.nbytes
            return value.clone()
        if isinstance(value, tuple):
            return tuple(self._detached(item, storages) for item in cast("tuple[object, ...]", value))
        if isinstance(value, dict):
            return {key: self._detached(item, storages) for key, item in cast("dict[object, object]", value).items()}
        return value

    def _finished_parameters(self) -> Iterator[torch.Tensor]:
        for layer in self._scope.modules():
            if not is_open(self._layerwise.info(layer)):
                yield from layer.parameters(recurse=False)


def _own_tensors(layer: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return (
        dict(layer.named_parameters(recurse=False, remove_duplicate=False)),
        dict(layer.named_buffers(recurse=False, remove_duplicate=False)),
    )


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _lacks_parts(layer: torch.nn.Module, calls: Sequence[Any]) -> bool:
    """Whether a fused parameter got fewer parts than it is made of."""
    parts = {call.get("loaded_shard_id", call.get("shard_id")) for call in calls}
    experts = {call["expert_id"] for call in calls if call.get("expert_id") is not None}
    if experts:
        return len(experts) < int(getattr(layer, "local_num_experts", 0))
    sizes = getattr(layer, "output_sizes", None)
    return None not in parts and sizes is not None and len(parts) < len(sizes)
