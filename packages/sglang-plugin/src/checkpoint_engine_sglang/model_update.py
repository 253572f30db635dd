"""One model of a worker while its new weights come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from checkpoint_engine.sdk import Tensors, UpdateFigures, WorkerError
from checkpoint_engine.sdk.plans import Rung, give_to_loader, names_of, nbytes_of
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.derived import derive
from checkpoint_engine_sglang.dry_run import LOADER
from checkpoint_engine_sglang.layouts import deriving_nothing
from checkpoint_engine_sglang.part import Untouched
from checkpoint_engine_sglang.planned_model import ModelLadder, PlannedModel, inverted
from checkpoint_engine_sglang.rebuilding import OpenLayer, attributes, process_in_place, put_back
from checkpoint_engine_sglang.whole_call import WholeCall

__all__ = ["SPLIT_UP", "ModelUpdate"]

SPLIT_UP = ".kv_b_proj"
"""How layers are called that latent attention makes its projections from, which must be as the checkpoint has them."""


class ModelUpdate:
    """Takes the tensors of one update: by copies as far as the plan reaches, else by SGLang's loader.

    Layers that SGLang has processed get their weights in fresh memory of the layout that the loader fills, and are
    processed once they have all of them.
    """

    def __init__(
        self, model: PlannedModel, names: Mapping[str, str], ladder: ModelLadder, *, partial: bool = False
    ) -> None:
        """Makes it.

        Args:
            model: What takes the weights.
            names: Name of a tensor -> its name in this model; others are not for it.
            ladder: What the update does with the plan: it has begun there.
            partial: Whether these tensors are all that may change anything.
        """
        self.model = model
        self._partial = partial
        self._untouched = Untouched(model) if partial and ladder.rung is not Rung.PLAN else None
        self.names = names
        self.ladder = ladder
        self._by_plan = ladder.rung.by_plan
        self._replay = model.replay() if self._by_plan else None
        self._proof = ladder.proof
        self._proved = model.targets
        """What it compares."""
        self._held: dict[str, torch.Tensor] = {}
        self._open: dict[str, OpenLayer] = {}
        self._done: set[str] = set()
        self._call: WholeCall | None = None
        """Of the loader, where that must see all tensors at once."""
        self._waits = set(model.rebuilt) if model.is_fed_whole else _left_waiting(model)
        self._missing = model.sources()
        """Layer -> tensors that it still lacks."""
        self._layers_of = inverted(self._missing)
        """Tensor -> layers that it is for."""
        self._targets_of = inverted({target: {model.layer_of(target)} for target in model.targets})
        """Layer -> what copies fill in it."""
        self._moving: dict[str, torch.Tensor] = {}
        self._derived = _derived_tensors(model)
        self._addresses = _addresses(model)
        own = {name for name, inside in names.items() if name == inside}
        self._copied_alone = (own & model.tensors) - model.loaded if self._by_plan else set[str]()
        """Tensors that only copies take, under the names that they come with."""
        self._nbytes = {"plan": 0, "loader": 0}
        self._read = 0

    @property
    def figures(self) -> UpdateFigures:
        """How weights are taken over."""
        return UpdateFigures(
            reload=self.ladder.rung.word,
            plan_bytes=self._nbytes["plan"],
            read_bytes=self._read,
            loader_bytes=self._nbytes["loader"],
            loader_reason=self.ladder.reason,
            engine={"rebuilt_layers": len(self.model.rebuilt)},
        )

    @property
    def only_copied(self) -> bool:
        """Whether nothing was done yet but copies of a whole update's plan into parameters that stay where they are."""
        others = self._open or self._done or self._held or self._call is not None or self._nbytes["loader"]
        return self._by_plan and not self._partial and not others

    def begin(self) -> None:
        """Makes the model ready where its loader is called once, and asks then where its parameters are."""
        if self._by_plan or not self.model.is_fed_whole:
            return
        for layer in self.model.rebuilt:
            self._open_layer(layer)
        self._call = WholeCall(self._load, self.model.device)

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """See `checkpoint_engine.contract.sink.Selective`."""
        if self._replay is None or self._proof is not None:
            return None
        return self._replay.spans(bucket) if self._copied_alone.issuperset(name for name, _ in bucket) else None

    def take(self, tensors: Tensors) -> None:
        """Loads those of the tensors that are this model's; their memory may be used again afterwards.

        Raises:
            WeightsRejectedError: the loader does not take a tensor.
            WorkerError: the loader or SGLang's processing failed.
        """
        for part in (tensors,) if self._call is not None else self.model.parting().of(tensors):
            self._take_part(part)

    def finish(self) -> None:
        """Completes the model; everything has come.

        Raises:
            WorkerError: SGLang's processing failed, moved weights that CUDA graphs read, or copies went astray.
        """
        if self._call is not None:
            self._call.finish()
        for layer, (_, layout) in self.model.rebuilt.items() if not self._partial else ():
            # What a checkpoint brings nothing for goes back to what it was at first.
            if layer not in self._done | self._open.keys() and all(
                slot.initial is not None for _, slot in layout.slots
            ):
                self._open_layer(layer)
        self._finish_in_place()
        for name, value in self.model.dry_run.constants.items() if not self._partial else ():
            held = self.model.live(name)
            if held is not None:
                held.copy_(value)
        self._derive()
        for layer in list(self._open):
            self._close_layer(layer)
        self._process_in_place()
        if self._proof is not None:
            self.ladder.judge(self._proof.differing(self._proved))
        self._refuse_moved()
        if self._untouched is not None:
            self._untouched.check()
        self.ladder.succeeded()

    def abort(self) -> None:
        """Puts the old weights back into layers that are not complete."""
        if self._call is not None:
            self._call.give_up()
        for layer in self._open.values():
            layer.undo()
        self._open.clear()

    def _take_part(self, tensors: Tensors) -> None:
        mine, copied, loaded = self._sort(tensors)
        if self._call is None:
            loaded = self._complete_groups(loaded)
        if self._proof is not None:
            self._proof.expect(mine, self._proved)
        arrived = {*names_of(copied), *names_of(loaded)}
        layers = sorted({layer for name in arrived for layer in self._layers_of.get(name, ())})
        for layer in layers:
            if layer not in self._open:
                self._open_layer(layer)
        if self._replay is not None:
            self._read += self._replay.load(copied, self._moving)
        if loaded:
            self._give_to_loader(loaded)
        for way, pairs in (("plan", copied), ("loader", loaded)):
            self._nbytes[way] += nbytes_of(pairs)
        for layer in layers:
            self._missing[layer].difference_update(arrived)
            if not self._missing[layer] and layer not in self._waits:
                self._close_layer(layer)

    def _sort(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """What is this model's, under its own names, and of that what copies and what the loader take over."""
        if self._copied_alone.issuperset(names_of(tensors)):
            return tensors, tensors, ()  # as it came: then what was worked out for it serves again
        mine = [(self.names[name], tensor) for name, tensor in tensors if name in self.names]
        copied = [pair for pair in mine if self._by_plan and pair[0] in self.model.tensors]
        return mine, copied, [pair for pair in mine if not self._by_plan or pair[0] in self.model.loaded]

    # -- layers

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
        filled = {target.rpartition(".")[0] for target in self.model.origins}
        for name, module, _ in compat.processed_modules(runner.model):
            if name not in self.model.rebuilt and not (self._partial and name not in filled):
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
        moved = [name for name, address in _addresses(self.model).items() if self._addresses.get(name) != address]
        if moved and self.model.runner.has_graphs:
            raise WorkerError(
                f"SGLang has moved the weights {', '.join(moved[:4])}: CUDA graphs that it has captured would go on "
                "with the old ones; start it with --disable-cuda-graph, or anew with the new weights"
            )

    # -- SGLang's loader

    def _give_to_loader(self, tensors: Tensors) -> None:
        if self._call is None:
            self._load(tensors)
            return
        for name, tensor in tensors:
            self._call.give(name, tensor)

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        model = self.model.runner.model
        compat.forget_parameters(model)
        computed_with = self.model.plan.recording.computed_with
        with deriving_nothing(model):
            loader = f"{LOADER} of the {self.model.runner.role} model"
            give_to_loader(loader, compat.loader_of(model), tensors, computed_with)

    def _complete_groups(self, tensors: Tensors) -> list[tuple[str, torch.Tensor]]:
        """Holds back what the loader joins with tensors that are still to come; adds what waited for these."""
        joined, here = self.model.plan.recording.joined, dict(tensors)
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


def _left_waiting(model: PlannedModel) -> set[str]:
    """Layers that the model derives something from, which it can do only before they are processed."""
    if not compat.deriving_modules(model.runner.model):
        return set()
    return {layer for layer in model.rebuilt if layer.endswith(SPLIT_UP)} or set(model.rebuilt)


def _derived_tensors(model: PlannedModel) -> dict[str, tuple[torch.nn.Module, dict[str, object]]]:
    """What modules hold besides parameters and buffers."""
    if not (compat.deriving_modules(model.runner.model) or model.dry_run.derived):
        return {}
    return {
        name: (module, attributes(module))
        for name, module in compat.named_modules(model.runner.model)
        if name not in model.rebuilt and attributes(module)
    }


def _addresses(model: PlannedModel) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.runner.model.named_parameters()}
