"""The update in which a plan earns its trust: vLLM's loader does it, and every piece of the plan is compared."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.errors import WorkerError
from checkpoint_engine.reload.proof import Proof
from checkpoint_engine_vllm.filling import Filling
from checkpoint_engine_vllm.layers import Layer, Layers, Way
from checkpoint_engine_vllm.reload import Reload

_MARKS = ("_already_called_process_weights_after_loading",)
"""Attributes by which vLLM notes that a layer was processed."""
_PART = 512 << 20
"""Bytes given to vLLM's loader at a time, so that few layers are incomplete at once."""

Tensors = Sequence[tuple[str, torch.Tensor]]


class ProvingReload:
    """An ordinary reload that watches what vLLM makes of each layer, and decides on the layers' ways."""

    way = "proof"

    def __init__(self, reload: Reload, layers: Layers) -> None:
        self._reload = reload
        self._layers = layers
        self._proof = Proof(layers.plan.reload, layers.device)
        self._planned = {id(layer.module): layer for layer in layers if layer.way is not Way.LOADER}
        self._targets = {target for layer in self._planned.values() for target in layer.targets}
        self._patched: list[Any] = []
        self._untouched: set[str] = set()
        """Names of layers that vLLM does not process, or whose processing changes nothing."""
        self._filling = Filling((), {})
        self._seen: set[str] = set()

    @property
    def cloned_bytes(self) -> int:
        """See `Reload`."""
        return self._reload.cloned_bytes

    def begin(self) -> None:
        """See `Reload`."""
        rebuilt = [layer for layer in self._planned.values() if not self._layers.obstacle_to_rebuilding(layer)]
        self._reload.begin()
        self._filling = Filling(rebuilt, self._layers.plan.reload.recording.origins)
        for layer in self._planned.values():
            method = getattr(layer.module, "quant_method", None)
            if hasattr(method, "process_weights_after_loading"):
                if not any(method is patched for patched in self._patched):
                    self._watch(method)
            else:
                self._untouched.add(layer.name)

    def load(self, tensors: Tensors) -> None:
        """See `Reload`."""
        for part in self._parts(tensors):
            names = [name for name, _ in part]
            self._filling.open(names)
            self._proof.expect(part, self._targets)
            self._reload.load(part)
            self._filling.close(names)

    def incomplete(self) -> list[str]:
        """See `Reload`."""
        return self._reload.incomplete()

    def finish(self) -> None:
        """Completes the reload, and decides on the layers' ways.

        Raises:
            WorkerError: a layer did not get all its tensors, although they came.
        """
        incomplete = self._filling.incomplete()
        if incomplete:
            raise WorkerError(f"vLLM's loader was not given all tensors of {', '.join(incomplete[:3])}")
        try:
            self._reload.finish()
        finally:
            self._unwatch()
        for layer in self._planned.values():
            if layer.name not in self._seen:
                self._find(layer)
        wrong = self._wrong()
        for layer in self._planned.values():
            differing = [target for target in layer.targets if target in wrong]
            if differing:
                layer.leave_to_loader(f"vLLM's loader put something else than {wrong[differing[0]]!r} into it")
            elif layer.way is Way.DIRECT and layer.name not in self._untouched:
                self._layers.rebuild(layer)
        self._layers.settle()

    def abort(self) -> bool:
        """See `Reload`."""
        self._unwatch()
        return self._reload.abort()

    # -- inside

    def _parts(self, tensors: Tensors) -> Iterator[Tensors]:
        """Some at a time; on the device, since the loader and the proof both read them."""
        device, part, nbytes = self._layers.device, list[tuple[str, torch.Tensor]](), 0
        for name, tensor in tensors:
            part.append((name, tensor.to(device, non_blocking=device.type != "cpu")))
            nbytes += tensor.nbytes
            if nbytes >= _PART:
                yield part
                part, nbytes = [], 0
        if part:
            yield part

    def _watch(self, method: Any) -> None:  # noqa: ANN401 - vLLM's own class
        original: Callable[[torch.nn.Module], object] = method.process_weights_after_loading

        def process(module: torch.nn.Module) -> object:
            layer = self._planned.get(id(module))
            if layer is None:
                return original(module)
            self._seen.add(layer.name)
            self._find(layer)
            if not type(method).__name__.startswith("Unquantized"):
                return original(module)
            before = self._state(layer, method)
            result = original(module)
            if before == self._state(layer, method):
                self._untouched.add(layer.name)
            return result

        method.process_weights_after_loading = process
        self._patched.append(method)

    def _unwatch(self) -> None:
        while self._patched:
            del self._patched.pop().process_weights_after_loading

    def _wrong(self) -> Mapping[str, str]:
        """Targets that hold something else than planned, both when their layer was processed and now."""
        wrong = self._proof.differing(self._targets)
        for layer in self._planned.values():
            # Some are loaded in place, maybe after their layer was processed.
            self._find(layer, wrong)
        return self._proof.differing(wrong)

    def _find(self, layer: Layer, only: Container[str] | None = None) -> None:
        for target in layer.targets:
            if only is not None and target not in only:
                continue
            tensor, planned = layer.tensor(target), self._layers.plan.targets[target]
            if tensor is None or tensor.is_meta:
                continue
            if (tensor.shape, tensor.dtype) == (planned.shape, planned.dtype):
                self._proof.find(target, tensor)

    def _state(self, layer: Layer, method: object) -> object:
        """Whatever processing could change: what the layer and its method hold, and the values of its tensors."""
        held = {
            (index, name): id(value)
            for index, owner in enumerate((layer.module, method))
            for name, value in vars(owner).items()
            if name not in {*_MARKS, "_parameters", "_buffers", "process_weights_after_loading"}
        }
        own: dict[str, torch.Tensor] = layer.module.state_dict(keep_vars=True)
        tensors = {name: tensor for name, tensor in own.items() if not tensor.is_meta}
        layouts = {name: (tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors.items()}
        sums = [self._proof.checksums.of(tensor) for tensor in tensors.values()]
        values: list[int] = cast("Any", torch.stack(sums)).tolist() if sums else []
        return held, layouts, values
