"""The update that proves a plan: vLLM's loader does it, and every piece of the plan is compared."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.sdk import Tensors, listed
from checkpoint_engine.sdk.plans import HeldTensors, Ladder, Proof
from checkpoint_engine_vllm.layers import Layer, Layers, Way
from checkpoint_engine_vllm.protocols import ModelConfig
from checkpoint_engine_vllm.reaching import reach_weights
from checkpoint_engine_vllm.reload import LayerwiseReload
from checkpoint_engine_vllm.repairs import Repairs

__all__ = ["ProvingReload"]

_MARKS = ("_already_called_process_weights_after_loading",)
"""Attributes by which vLLM notes that a layer was processed."""
_PART = 512 << 20
"""Bytes given to vLLM's loader at a time, so that few layers are incomplete at once."""


class ProvingReload(LayerwiseReload):
    """An ordinary reload that watches what vLLM makes of each layer, and decides on the layers' ways."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        repairs: Repairs,
        shared: frozenset[torch.nn.Module],
        ladder: Ladder[Layers],
        layers: Layers,
        only: Sequence[torch.nn.Module] | None = None,
    ) -> None:
        super().__init__(model, model_config, repairs, shared, only, plan=layers.load_plan)
        self._ladder = ladder
        self._layers = layers
        self._proof = ladder.proof or Proof(layers.plan, layers.device)
        self._planned = {id(layer.module): layer for layer in layers if layer.way is not Way.LOADER}
        self._targets = layers.targets
        self._patched: list[Any] = []
        self._untouched: set[str] = set()
        """Names of layers that vLLM does not process, or whose processing changes nothing."""
        self._seen: set[str] = set()
        self._before: HeldTensors | None = None
        """What the model held when the update began."""

    def begin(self) -> None:
        """See `Reload`."""
        self._before = HeldTensors(reach_weights(self.model), self._proof.checksums)
        rebuilt = [layer for layer in self._planned.values() if not self._layers.obstacle_to_rebuilding(layer)]
        super().begin()
        self._filling.add(rebuilt, self._layers.plan.recording.origins)
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
            self._proof.expect(part, self._targets)
            super().load(part)

    def finish(self) -> None:
        """Completes the reload, and decides on the layers' ways.

        Raises:
            WorkerError: a layer did not get all its tensors, although they came.
        """
        try:
            super().finish()
        finally:
            self._unwatch()
        for layer in self._planned.values():
            if layer.name not in self._seen:
                self._find(layer)
        self._ladder.judge(self._wrong())
        for layer in self._planned.values():
            if layer.way is Way.IN_PLACE and layer.name not in self._untouched:
                self._layers.rebuild(layer)
        self._judge_what_changed()
        self._layers.settle()

    def abort(self) -> bool:
        """See `Reload`."""
        self._unwatch()
        return super().abort()

    # -- inside

    def _judge_what_changed(self) -> None:
        """Compares all that the model holds with what it held before."""
        if self._before is None:
            return
        changed = self._before.differing(reach_weights(self.model))
        self._before = None
        self._layers.tried = bool(changed)
        missed = self._layers.leave_what_no_copy_reaches(changed)
        if missed:
            self._ladder.add_reason(f"vLLM's loader changes {listed(missed)} too, which no copy reaches")

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
            tensor, planned = layer.tensor(target), self._layers.load_plan.targets[target]
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
