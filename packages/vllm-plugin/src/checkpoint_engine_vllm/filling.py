"""Layers that vLLM's loader fills at once.

Its layerwise reload would keep every tensor and run twice for each; and it would not see what the loader of a model
copies into parameters by itself, as those of gpt-oss do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping

import torch

from checkpoint_engine.sdk import WeightsRejectedError
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layer
from checkpoint_engine_vllm.loadplan import LoadPlan

__all__ = ["Filling"]


class Filling:
    """Gives layers memory laid out as in the checkpoint before their tensors come; processes them once all came."""

    def __init__(self, layers: Iterable[Layer], origins: Mapping[str, Collection[str]]) -> None:
        """Makes it for those of `layers` that can be filled so; `origins` are the tensors that a target comes from."""
        self._layerwise = compat.layerwise()
        self._of_tensor: dict[str, list[Layer]] = {}
        self._left: Counter[str] = Counter()
        """Tensors that a layer still waits for."""
        self._open: set[str] = set()
        self.add(layers, origins)

    def add(self, layers: Iterable[Layer], origins: Mapping[str, Collection[str]]) -> None:
        """Fills those of `layers` too that can be filled so."""
        for layer in filter(self._is_whole, layers):
            names = {name for target in layer.targets for name in origins.get(target, ())}
            if layer.name not in self._left:
                self._left[layer.name] = len(names)
                for name in names:
                    self._of_tensor.setdefault(name, []).append(layer)

    @classmethod
    def for_direct(cls, plan: LoadPlan, model: torch.nn.Module, only: Container[torch.nn.Module]) -> Filling:
        """For those of `only` that vLLM's loader writes to by itself.

        Raises:
            WeightsRejectedError: one of them cannot be filled so, and would keep old weights.
        """
        modules, layers = compat.modules_by_name(model), dict[str, Layer]()
        for target in plan.reload.targets:
            name, _, own = target.rpartition(".")
            if name in modules and modules[name] in only:
                layers.setdefault(name, Layer(name, modules[name])).targets[target] = own
        direct = [layer for layer in layers.values() if _loses(layer, plan.direct)]
        for layer in direct:
            if not cls._is_whole(layer) or compat.is_attention(layer.module):
                raise WeightsRejectedError(
                    f"vLLM's loader writes into layer {layer.name!r} by itself, which its reload does not see, and "
                    "others of its parameters get nothing: it would keep old weights; start the engine anew with this "
                    "checkpoint, and please report this"
                )
        return cls(direct, plan.reload.recording.origins)

    def open(self, names: Iterable[str]) -> None:
        """Called before vLLM's loader gets these tensors."""
        for layer in self._layers_of(names):
            if layer.name not in self._open:
                self._open.add(layer.name)
                self._layerwise.materialize(layer.module)
                for tensor in (*layer.module.parameters(recurse=False), *layer.module.buffers(recurse=False)):
                    compat.load_without_processing(tensor)

    def close(self, names: Iterable[str]) -> None:
        """Called after it got them.

        Raises:
            WorkerError: vLLM could not process a layer.
        """
        for layer in self._layers_of(names):
            self._left[layer.name] -= 1
            if not self._left[layer.name]:
                layer.process()

    def incomplete(self) -> list[str]:
        """Layers that did not get all their tensors."""
        return [f"{name} ({count} tensors missing)" for name, count in self._left.items() if count]

    @staticmethod
    def _is_whole(layer: Layer) -> bool:
        """Whether all its parameters come from tensors, and are not filled where they are."""
        info = compat.layerwise().info(layer.module)
        parameters, _ = info.restore_metadata
        return parameters.keys() <= set(layer.targets.values()) and not getattr(info, "runtime_bound", False)

    def _layers_of(self, names: Iterable[str]) -> Iterable[Layer]:
        """Once for each of the tensors."""
        return (layer for name in names for layer in self._of_tensor.get(name, ()))


def _loses(layer: Layer, direct: Collection[str]) -> bool:
    """Whether a reload puts tensors of a layer away that vLLM's loader then writes to by itself."""
    parameters, buffers = compat.layerwise().info(layer.module).restore_metadata
    return any(own in parameters or own in buffers for target, own in layer.targets.items() if target in direct)
