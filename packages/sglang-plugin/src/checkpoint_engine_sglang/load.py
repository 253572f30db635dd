"""One model of a worker while its new weights come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.engine.loading import Tensors, give_to_loader
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.reload.delivery import names_of, nbytes_of
from checkpoint_engine.reload.reloader import Trust
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.derived import derive
from checkpoint_engine_sglang.layouts import deriving_nothing
from checkpoint_engine_sglang.plans import Model
from checkpoint_engine_sglang.rebuilding import OpenLayer, attributes, process_in_place, put_back
from checkpoint_engine_sglang.trial import LOADER

SPLIT_UP = ".kv_b_proj"
"""How layers are called that latent attention makes its projections from, which must be as the checkpoint has them."""


class Load:
    """Takes the tensors of one update: by copies as far as the plan reaches, else by SGLang's loader.

    Layers that SGLang has processed get their weights in fresh memory of the layout that the loader fills, and are
    processed once they have all of them.
    """

    def __init__(self, model: Model, names: Mapping[str, str], *, planned: bool) -> None:
        """Makes it.

        Args:
            model: What takes the weights.
            names: Name of a tensor -> its name in this model; others are not for it.
            planned: Whether copies may take the place of the loader, once they are proved.
        """
        self.model = model
        self.names = names
        self._by_plan = planned and bool(model.targets) and model.trust > Trust.RECORDED
        self._replay = model.replay() if self._by_plan else None
        self._proof = model.proof() if planned else None
        self._delivered: set[str] = set()
        self._held: dict[str, torch.Tensor] = {}
        self._open: dict[str, OpenLayer] = {}
        self._done: set[str] = set()
        self._waits = _left_waiting(model)
        self._missing = {} if model.trial is None else self._sources(model.trial.recording.origins)
        """Layer -> tensors that it still lacks."""
        self._layers_of = _inverted(self._missing)
        """Tensor -> layers that it is for."""
        self._targets_of = _inverted({target: {model.layer_of(target)} for target in model.targets})
        """Layer -> what copies fill in it."""
        self._moving: dict[str, torch.Tensor] = {}
        self._derived = _derived_tensors(model)
        self._places = _places(model)
        own = {name for name, inside in names.items() if name == inside}
        self._copied_alone = (own & set(model.tensors)) - set(model.loaded) if self._by_plan else set[str]()
        """Tensors that only copies take, under the names that they come with."""
        self.nbytes = {"plan": 0, "loader": 0}

    @property
    def way(self) -> str:
        """How weights are taken over, for people."""
        return "plan" if self._by_plan else "loader" if self._proof is None else "proof"

    def begin(self) -> None:
        """Makes the model ready where it is not known which layer needs which tensors."""
        for layer in self.model.rebuilt if self.model.trial is None else ():
            self._open_layer(layer)

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """See `checkpoint_engine.engine.adapter.Selective`."""
        if self._replay is None or self._proof is not None:
            return None
        return self._replay.spans(bucket) if self._copied_alone.issuperset(name for name, _ in bucket) else None

    def take(self, tensors: Tensors) -> None:
        """Loads those of the tensors that are this model's; their memory may be used again afterwards.

        Raises:
            WeightsRejectedError: the loader does not take a tensor.
            WorkerError: the loader or SGLang's processing failed.
        """
        mine, copied, loaded = self._sort(tensors)
        self._delivered.update(names_of(mine))
        loaded = self._complete_groups(loaded)
        if self._proof is not None:
            self._proof.expect(mine, self.model.targets)
        arrived = {*names_of(copied), *names_of(loaded)}
        layers = sorted({layer for name in arrived for layer in self._layers_of.get(name, ())})
        for layer in layers:
            if layer not in self._open:
                self._open_layer(layer)
        if self._replay is not None:
            self._replay.load(copied, self._moving)
        if loaded:
            self._give_to_loader(loaded)
        for way, pairs in (("plan", copied), ("loader", loaded)):
            self.nbytes[way] += nbytes_of(pairs)
        for layer in layers:
            self._missing[layer].difference_update(arrived)
            if not self._missing[layer] and layer not in self._waits:
                self._close_layer(layer)

    def finish(self) -> None:
        """Checks that everything came, and completes the model.

        Raises:
            WeightsRejectedError: a tensor is missing.
            WorkerError: SGLang's processing failed, moved weights that CUDA graphs read, or copies went astray.
        """
        self._refuse_lost()
        for layer, (_, layout) in self.model.rebuilt.items():
            # What a checkpoint brings nothing for goes back to what it was at first.
            if layer not in self._done | self._open.keys() and all(
                slot.initial is not None for _, slot in layout.slots
            ):
                self._open_layer(layer)
        self._finish_in_place()
        self._derive()
        for layer in list(self._open):
            self._close_layer(layer)
        self._process_in_place()
        wrong: Mapping[str, str] = {} if self._proof is None else self._proof.differing(self.model.targets)
        if wrong and self._by_plan:
            target, source = next(iter(wrong.items()))
            raise WorkerError(
                f"the reload plan put something else than tensor {source!r} into {target!r} of the "
                f"{self.model.runner.role} model; the next update goes through SGLang's loader. Please report this"
            )
        if self._proof is not None:
            self.model.succeeded(wrong)
        self._refuse_moved()

    def abort(self) -> None:
        """Puts the old weights back into layers that are not complete."""
        for layer in self._open.values():
            layer.undo()
        self._open.clear()

    def _sort(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """What is this model's, under its own names, and of that what copies and what the loader take over."""
        if self._copied_alone.issuperset(names_of(tensors)):
            return tensors, tensors, ()  # as it came: then what was worked out for it serves again
        mine = [(self.names[name], tensor) for name, tensor in tensors if name in self.names]
        copied = [pair for pair in mine if self._by_plan and pair[0] in self.model.tensors]
        return mine, copied, [pair for pair in mine if not self._by_plan or pair[0] in self.model.loaded]

    def _refuse_lost(self) -> None:
        lost = [own for own in self.names.values() if own not in self._delivered]
        if lost:
            raise WeightsRejectedError(f"announced but not delivered: {', '.join(lost[:8])}")

    # -- layers

    def _sources(self, origins: Mapping[str, set[str]]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for target, names in origins.items():
            layer = self.model.layer_of(target)
            if layer and names:
                found.setdefault(layer, set()).update(names)
        return found

    def _open_layer(self, layer: str) -> None:
        module, layout = self.model.rebuilt[layer]
        self._open[layer] = opened = OpenLayer(layer, module, layout, self.model.runner)
        for target in self._targets_of.get(layer, ()):
            tensor = opened.tensor(target.rpartition(".")[2])
            if tensor is not None:
                self._moving[target] = tensor

    def _close_layer(self, layer: str) -> None:
        opened = self._open[layer]
        for own, _ in self.model.rebuilt[layer][1].slots:
            target, tensor = f"{layer}.{own}".lstrip("."), opened.tensor(own)
            if tensor is not None and target in self.model.targets:
                self._complete(target, tensor)
        opened.close()
        del self._open[layer]
        self._done.add(layer)

    def _complete(self, target: str, memory: torch.Tensor) -> None:
        if self._replay is not None:
            self._replay.fill(target, memory)
        if self._proof is not None:
            self._proof.find(target, memory)
        self._moving.pop(target, None)

    def _finish_in_place(self) -> None:
        if self._replay is not None:
            self._replay.fill_fixed()
        for target in self.model.targets if self._proof is not None else ():
            tensor = None if self.model.layer_of(target) else self.model.live(target)
            if tensor is not None and self._proof is not None:
                self._proof.find(target, tensor)

    def _process_in_place(self) -> None:
        runner = self.model.runner
        if compat.is_reloading_by_itself(runner.model):
            return
        for name, module, _ in compat.processed_modules(runner.model):
            if name not in self.model.rebuilt:
                process_in_place(name, module, runner)

    def _derive(self) -> None:
        """Has the model compute anew what it keeps besides its parameters, and puts that where it was.

        Where its loader has done so already, it is only put there.
        """
        runner = self.model.runner
        derive(runner)
        for name, (module, tensors) in self._derived.items():
            put_back(name, module, tensors, runner)

    def _refuse_moved(self) -> None:
        moved = [name for name, place in _places(self.model).items() if self._places.get(name) != place]
        if moved and self.model.runner.has_graphs:
            raise WorkerError(
                f"SGLang has moved the weights {', '.join(moved[:4])}: CUDA graphs that it has captured would go on "
                "with the old ones; start it with --disable-cuda-graph, or anew with the new weights"
            )

    # -- SGLang's loader

    def _give_to_loader(self, tensors: Tensors) -> None:
        model = self.model.runner.model
        compat.forget_parameters(model)
        with deriving_nothing(model):
            give_to_loader(f"{LOADER} of the {self.model.runner.role} model", cast("Any", model).load_weights, tensors)

    def _complete_groups(self, tensors: Tensors) -> list[tuple[str, torch.Tensor]]:
        """Holds back what the loader joins with tensors that are still to come; adds what waited for these."""
        joined = {} if self.model.trial is None else self.model.trial.recording.joined
        here = dict(tensors)
        ready: list[tuple[str, torch.Tensor]] = []
        for name, tensor in tensors:
            group = joined.get(name, frozenset((name,)))
            if group <= here.keys() | self._held.keys():
                ready.extend((other, self._held.pop(other)) for other in sorted(group & self._held.keys()))
                ready.append((name, tensor))
            else:
                self._held[name] = tensor.clone()
                here.pop(name)
        return ready


def _inverted(found: Mapping[str, set[str]]) -> dict[str, set[str]]:
    inverse: dict[str, set[str]] = {}
    for name, others in found.items():
        for other in others:
            inverse.setdefault(other, set()).add(name)
    return inverse


def _left_waiting(model: Model) -> set[str]:
    """Layers that the model derives something from, which it can do only before they are processed."""
    if not compat.deriving_modules(model.runner.model):
        return set()
    return {layer for layer in model.rebuilt if layer.endswith(SPLIT_UP)} or set(model.rebuilt)


def _derived_tensors(model: Model) -> dict[str, tuple[torch.nn.Module, dict[str, object]]]:
    """What modules hold besides parameters and buffers."""
    if not (compat.deriving_modules(model.runner.model) or (model.trial is not None and model.trial.derived)):
        return {}
    return {
        name: (module, attributes(module))
        for name, module in compat.named_modules(model.runner.model)
        if name not in model.rebuilt and attributes(module)
    }


def _places(model: Model) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.runner.model.named_parameters()}
