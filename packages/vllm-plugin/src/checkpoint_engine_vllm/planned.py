"""A reload by plan: batched copies instead of vLLM's loader, as far as the plan reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from checkpoint_engine.errors import WorkerError
from checkpoint_engine.reload.proof import Proof
from checkpoint_engine.reload.replay import Replay
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layer, Layers, Way
from checkpoint_engine_vllm.protocols import ModelConfig
from checkpoint_engine_vllm.reload import Reload
from checkpoint_engine_vllm.repairs import Repairs


class PlannedReload:
    """Replaces the weights of one model. Everything here runs inside `compat.engine_context`."""

    way = "plan"

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        repairs: Repairs,
        layers: Layers,
        replay: Replay,
        *,
        lent: frozenset[torch.nn.Module] = frozenset(),
        checked: bool = False,
    ) -> None:
        """Makes the reload.

        Args:
            model: What takes the weights.
            model_config: Its configuration.
            repairs: What vLLM forgets.
            layers: The way of each of its layers.
            replay: The copies for those that are `DIRECT` or `REBUILT`.
            lent: Modules of another model, whose reload fills them.
            checked: Whether to compare checksums of all that was copied.
        """
        self._model = model
        self._model_config = model_config
        self._repairs = repairs
        self._layers = layers
        self._replay = replay
        self._lent = lent
        self._layerwise = compat.layerwise()
        self._proof = Proof(layers.plan.reload, layers.device) if checked else None
        self._planned = {target for layer in layers if layer.way is not Way.LOADER for target in layer.targets}
        self._rebuilt = layers.tensors_of(Way.REBUILT)
        self._direct = layers.tensors_of(Way.DIRECT)
        self._loaded = layers.tensors_of(Way.LOADER)
        self._by_target = {target: layer for layer in layers.of(Way.REBUILT) for target in layer.targets}
        self._left = Counter(
            self._by_target[piece.target].name
            for pieces in layers.plan.reload.pieces.values()
            for piece in pieces
            if piece.target in self._by_target
        )
        """Pieces that a layer still waits for."""
        self._open: dict[str, Layer] = {}
        self._in_place: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """Open layer -> tensors of it that stay where they are, such as biases, and their old values."""
        self._moving: dict[str, torch.Tensor] = {}
        self._done: list[Layer] = []
        self._written = False
        others = [layer.module for layer in layers.of(Way.LOADER)]
        self._loader = Reload(model, model_config, Repairs(), lent, others) if others else None

    @property
    def cloned_bytes(self) -> int:
        """See `Reload`."""
        return 0 if self._loader is None else self._loader.cloned_bytes

    def begin(self) -> None:
        """Makes the model ready for new weights."""
        self._repairs.before(self._model)
        if self._loader is not None:
            self._loader.begin()

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copies tensors to where they belong; their memory may be used again once the current stream has run dry.

        Raises:
            WorkerError: vLLM's loader or processing failed.
        """
        self._open_layers(tensors)
        self._written = self._written or any(name in self._direct for name, _ in tensors)
        self._replay.load(tensors, self._moving)
        if self._proof is not None:
            self._proof.expect(tensors, self._planned)
        self._close_layers(tensors)
        if self._loader is not None:
            self._loader.load([pair for pair in tensors if pair[0] in self._loaded])

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
        by_loader = {id(layer.module) for layer in self._layers.of(Way.LOADER)}
        for module in self._model.modules():
            if compat.is_attention(module) and module not in self._lent and id(module) not in by_loader:
                compat.process_attention(module, self._model_config)
        self._repairs.after(self._model)

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

    def _to_rebuild(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
        return [name for name, _ in tensors if name in self._rebuilt and name in self._layers.plan.reload.pieces]

    def _open_layers(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Gives memory laid out as in the checkpoint to the layers to be rebuilt that these tensors belong to."""
        for name in self._to_rebuild(tensors):
            for piece in self._layers.plan.reload.pieces[name]:
                layer = self._by_target.get(piece.target)
                if layer is None or layer.name in self._open:
                    continue
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

    def _close_layers(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Processes the layers that have got their last piece."""
        for name in self._to_rebuild(tensors):
            for piece in self._layers.plan.reload.pieces[name]:
                layer = self._by_target.get(piece.target)
                if layer is None:
                    continue
                self._left[layer.name] -= 1
                if not self._left[layer.name]:
                    self._process(layer)

    def _process(self, layer: Layer) -> None:
        for target in layer.targets:
            memory = self._moving.pop(target)
            self._replay.fill(target, memory)
            if self._proof is not None:
                self._proof.find(target, memory)
        try:
            self._layerwise.process(layer.module)
        except Exception as error:
            raise WorkerError(
                f"vLLM could not process layer {layer.name!r}: {type(error).__name__}: {error}"
            ) from error
        del self._open[layer.name], self._in_place[layer.name]
        self._done.append(layer)

    def _compare(self, proof: Proof) -> None:
        for layer in self._layers.of(Way.DIRECT):
            for target in layer.targets:
                tensor = layer.tensor(target)
                if tensor is not None:
                    proof.find(target, tensor)
        wrong = proof.differing(self._planned)
        if wrong:
            target, source = next(iter(wrong.items()))
            raise WorkerError(
                f"the reload plan put something else than tensor {source!r} into {target!r} ({len(wrong)} parameters "
                "differ in their checksums); the next update goes through vLLM's loader. Please report this"
            )
