"""Layers that vLLM's loader fills at once; its layerwise reload would keep every tensor and run twice for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layer


class Filling:
    """Gives layers memory laid out as in the checkpoint before their tensors come; processes them once all came."""

    def __init__(self, layers: Iterable[Layer], origins: Mapping[str, Collection[str]]) -> None:
        """Makes it for those of `layers` that can be filled so; `origins` are the tensors that a target comes from."""
        self._layerwise = compat.layerwise()
        self._of_tensor: dict[str, list[Layer]] = {}
        for layer in filter(self._is_whole, layers):
            for name in {name for target in layer.targets for name in origins.get(target, ())}:
                self._of_tensor.setdefault(name, []).append(layer)
        self._left = Counter(layer.name for found in self._of_tensor.values() for layer in found)
        """Tensors that a layer still waits for."""
        self._open: set[str] = set()

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

    def _is_whole(self, layer: Layer) -> bool:
        """Whether all its parameters come from tensors, and are not filled where they are."""
        info = self._layerwise.info(layer.module)
        parameters, _ = info.restore_metadata
        return parameters.keys() <= set(layer.targets.values()) and not getattr(info, "runtime_bound", False)

    def _layers_of(self, names: Iterable[str]) -> Iterable[Layer]:
        """Once for each of the tensors."""
        return (layer for name in names for layer in self._of_tensor.get(name, ()))
