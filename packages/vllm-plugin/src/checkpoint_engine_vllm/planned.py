"""A reload by plan: batched copies instead of vLLM's loader, as far as the plan reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from checkpoint_engine.sdk import Tensors, WorkerError
from checkpoint_engine.sdk.plans import Ladder, Proof, names_of
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layer, Layers, Way
from checkpoint_engine_vllm.protocols import ModelConfig
from checkpoint_engine_vllm.reload import LayerwiseReload
from checkpoint_engine_vllm.repairs import Repairs

__all__ = ["PlannedReload"]


class PlannedReload:
    """Replaces the weights of one model. Everything here runs inside `compat.engine_context`."""

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
        """Makes the reload.

        Args:
            model: What takes the weights.
            model_config: Its configuration.
            repairs: What vLLM forgets.
            shared: Modules of another model, whose reload fills them.
            ladder: Says whether checksums of all that was copied are compared, and judges them.
            layers: The model's.
            only: Modules that nothing else than which may change; all if None.
        """
        self._model = model
        self._scope = model if only is None else compat.Scope(only)
        self._model_config = model_config
        self._repairs = repairs
        self._ladder = ladder
        self._proof = ladder.proof
        self._layers = layers
        self._routes = routes = layers.routes
        self._replay = routes.replay
        self._layerwise = compat.layerwise()
        self._left = Counter(routes.pieces)
        """Pieces that a layer still waits for."""
        self._open: dict[str, Layer] = {}
        self._in_place: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """Open layer -> tensors of it that stay where they are, such as biases, and their old values."""
        self._moving: dict[str, torch.Tensor] = {}
        self._done: list[Layer] = []
        self._written = False
        self.read_bytes = 0
        """Bytes that copies have read."""
        others = [layer.module for layer in self._layers.of(Way.LOADER)]
        self._loader = self._loader_of(others, shared) if others else None

    def _loader_of(self, others: list[torch.nn.Module], shared: frozenset[torch.nn.Module]) -> LayerwiseReload:
        plan = self._layers.load_plan
        return LayerwiseReload(self._model, self._model_config, Repairs(), shared, others, plan)

    @property
    def cloned_bytes(self) -> int:
        """See `Reload`."""
        return 0 if self._loader is None else self._loader.cloned_bytes

    @property
    def loader_bytes(self) -> int:
        """See `Reload`."""
        return 0 if self._loader is None else self._loader.loader_bytes

    @property
    def only_copied(self) -> bool:
        """Whether nothing was done yet but copies into parameters that stay where they are."""
        return self._loader is None and not self._open and not self._done

    def begin(self) -> None:
        """Makes the model ready for new weights."""
        self._repairs.before(self._scope)
        compat.compile_for_plain_tensors()  # no loader need have run before
        if self._loader is not None:
            self._loader.begin()

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """See `checkpoint_engine.contract.sink.Selective`."""
        by_plan = self._proof is None and self._loader is None
        return self._replay.spans(bucket) if by_plan else None

    def load(self, tensors: Tensors) -> None:
        """Copies tensors to where they belong; their memory may be used again once the current stream has run dry.

        Raises:
            WorkerError: vLLM's loader or processing failed.
        """
        for part in self._routes.parting.of(tensors):
            self._load_part(part)

    def incomplete(self) -> list[str]:
        """Layers that did not get all their pieces; a plan whose tensors all came leaves none."""
        return [f"{name} ({count} pieces missing)" for name, count in self._left.items() if count]

    def finish(self) -> None:
        """Completes what is left to do once all tensors are there.

        Raises:
            WorkerError: the copies did not arrive as planned.
        """
        self._replay.fill_fixed()
        if self._proof is not None:
            self._compare(self._proof)
        if self._loader is not None:
            self._loader.finish()
        for module in self._routes.attention:
            compat.process_attention(module, self._model_config)
        self._repairs.after(self._scope)

    def abort(self) -> bool:
        """Puts the old weights back into layers that are not complete; returns whether those were all."""
        intact = not self._written and not self._done
        for layer in self._open.values():
            for tensor, old in self._in_place[layer.name]:
                tensor.data.copy_(old)
            info = self._layerwise.info(layer.module)
            info.loaded_weights.clear()
            info.load_numel = 0
        self._layerwise.finalize(compat.Scope(layer.module for layer in self._open.values()), self._model_config)
        if self._loader is not None:
            intact = self._loader.abort() and intact
        self._repairs.undo(layer.module for layer in self._done)
        return intact

    # -- inside

    def _load_part(self, tensors: Tensors) -> None:
        self._open_layers(tensors)
        self._written = self._written or not self._routes.in_place.isdisjoint(names_of(tensors))
        self.read_bytes += self._replay.load(tensors, self._moving)
        if self._proof is not None:
            self._proof.expect(tensors, self._routes.planned)
        self._close_layers(tensors)
        if self._loader is not None:
            left = [pair for pair in tensors if pair[0] in self._routes.by_loader]
            if left:
                self._loader.load(left)

    def _to_rebuild(self, tensors: Tensors) -> Iterator[Layer]:
        """The layers to be rebuilt that these tensors have pieces for, once for each piece."""
        rebuilt = self._routes.rebuilt
        return (layer for name in names_of(tensors) for layer in rebuilt.get(name, ())) if rebuilt else iter(())

    def _open_layers(self, tensors: Tensors) -> None:
        """Gives memory laid out as in the checkpoint to the layers to be rebuilt that these tensors belong to."""
        for layer in self._to_rebuild(tensors):
            if layer.name not in self._open:
                self._open[layer.name] = layer
                self._layerwise.initialize(compat.Scope([layer.module]))
                self._in_place[layer.name] = [
                    (tensor, tensor.detach().clone())
                    for tensor in (*layer.module.parameters(recurse=False), *layer.module.buffers(recurse=False))
                    if not tensor.is_meta
                ]
                self._layerwise.materialize(layer.module)
                for target in layer.targets:
                    tensor = layer.tensor(target)
                    if tensor is None:
                        raise WorkerError(f"vLLM gave layer {layer.name!r} no {layer.targets[target]!r} to load into")
                    self._moving[target] = tensor

    def _close_layers(self, tensors: Tensors) -> None:
        """Processes the layers that have got their last piece."""
        for layer in self._to_rebuild(tensors):
            self._left[layer.name] -= 1
            if not self._left[layer.name]:
                self._process(layer)

    def _process(self, layer: Layer) -> None:
        for target in layer.targets:
            memory = self._moving.pop(target)
            self._replay.fill(target, memory)
            if self._proof is not None:
                self._proof.find(target, memory)
        layer.process()
        del self._open[layer.name], self._in_place[layer.name]
        self._done.append(layer)

    def _compare(self, proof: Proof) -> None:
        for layer in self._layers.of(Way.IN_PLACE):
            for target in layer.targets:
                tensor = layer.tensor(target)
                if tensor is not None:
                    proof.find(target, tensor)
        self._ladder.judge(proof.differing(self._routes.planned))
