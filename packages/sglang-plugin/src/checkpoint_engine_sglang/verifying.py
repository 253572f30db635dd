"""Compares what a SGLang worker holds with what a checkpoint would make of it.

Parameters that SGLang leaves as the checkpoint has them are compared by the checksums of the plan's pieces. A layer
that it processes is opened in its first layout, filled by its loader, processed, compared, and put back as it was.
What the model derives from its weights is derived from the checkpoint's, beside what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from checkpoint_engine.engine.findings import Findings
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.derived import OverwritesWeightsError, derive_apart
from checkpoint_engine_sglang.load import SPLIT_UP, Load, Tensors
from checkpoint_engine_sglang.plans import Model


def to_be_opened(model: Model) -> set[str]:
    """Layers that the plan does not reach as they are, and those that latent attention derives something from."""
    origins = {} if model.trial is None else model.trial.recording.origins
    by_loader = {target.rpartition(".")[0] for target in origins if target not in model.targets}
    split_up = {target.rpartition(".")[0] for target in origins if target.rpartition(".")[0].endswith(SPLIT_UP)}
    return by_loader | split_up if compat.deriving_modules(model.runner.model) else by_loader


class Comparison(Load):
    """One model of a worker while a checkpoint passes by."""

    def __init__(self, model: Model, names: Mapping[str, str], *, planned: bool) -> None:
        super().__init__(model, names, planned=planned)
        self.findings = Findings()
        self._in_place = {target for target in model.targets if not model.layer_of(target)}
        self._origins = {} if model.trial is None else model.trial.recording.origins
        kept = {name for target, names in self._origins.items() if not model.layer_of(target) for name in names}
        # What cannot be filled without filling others in place is passed over.
        self._missing = {layer: names for layer, names in self._missing.items() if not names & kept}
        self._waits = {layer for layer in self._missing if layer.endswith(SPLIT_UP)}
        self._for_layers = set[str]().union(*self._missing.values())

    def take(self, tensors: Tensors) -> None:
        """Compares what these tensors complete; their memory may be used again afterwards.

        Raises:
            WeightsRejectedError: the loader does not take a tensor.
            WorkerError: the loader or SGLang's processing failed.
        """
        mine = [(self.names[name], tensor) for name, tensor in tensors if name in self.names]
        self._delivered.update(name for name, _ in mine)
        if self._proof is not None:
            self._proof.expect(mine, self._in_place)
        loaded = self._complete_groups([pair for pair in mine if pair[0] in self._for_layers])
        arrived = {name for name, _ in loaded}
        for layer, lacking in self._missing.items():
            if not lacking.isdisjoint(arrived) and layer not in self._open:
                self._open_layer(layer)
        if loaded:
            self._give_to_loader(loaded)
        for layer, lacking in self._missing.items():
            lacking.difference_update(arrived)
            if not lacking and layer in self._open and layer not in self._waits:
                self._close_layer(layer)

    def finish(self) -> None:
        """Compares what waited for all weights, and what stays in place.

        Raises:
            WeightsRejectedError: a tensor is missing.
            WorkerError: SGLang's processing failed, or the model did when it derived something.
        """
        self._refuse_lost()
        self._compare_derived()
        for layer in list(self._open):
            self._close_layer(layer)
        wrong: Mapping[str, str] = {}
        live = {target: tensor for target in self._in_place if (tensor := self.model.live(target)) is not None}
        if self._proof is not None:
            for target, tensor in live.items():
                self._proof.find(target, tensor)
            wrong = self._proof.differing(self._in_place)
        found = self.findings
        found.tensors += len(live)
        found.nbytes += sum(tensor.nbytes for tensor in live.values())
        found.different += sorted(wrong)
        done = {tensor.data_ptr() for tensor in live.values()}
        nothing, unplaced = "the checkpoint has nothing for it", "only its loader can place it"
        found.not_compared += [
            f"{name} ({unplaced if name in self._origins else nothing})"
            for name, tensor in self.model.runner.model.named_parameters()
            if name.rpartition(".")[0] not in self._done and tensor.numel() and tensor.data_ptr() not in done
        ]
        self.abort()

    def _compare_derived(self) -> None:
        """Derives from the weights of layers that are open, and from others as they are (they are compared too)."""
        runner, rebuilt, trial = self.model.runner, self.model.rebuilt, self.model.trial
        if trial is not None and trial.derived:
            self._leave_out_derived(f"its loader derives {trial.derived[0]} itself")
            return
        if not compat.deriving_modules(runner.model):
            return
        split_up = {layer for layer in rebuilt if layer.endswith(SPLIT_UP)}
        if split_up - self._open.keys() or (rebuilt and not split_up):
            self._leave_out_derived("layers that it may come from are processed already")
            return
        try:
            derived = derive_apart(runner, {rebuilt[layer][0] for layer in self._open})
        except OverwritesWeightsError as error:
            self._leave_out_derived(str(error))
            return
        for one in derived:
            if one.held is None or one.expected is None:
                self.findings.tensors += 1
                self.findings.different.append(one.name)
            else:
                self.findings.note(one.name, one.held, one.expected)

    def _leave_out_derived(self, why: str) -> None:
        self.findings.not_compared.append(f"what the model derives from its weights ({why})")

    def _close_layer(self, layer: str) -> None:
        opened = self._open[layer]
        try:
            for own, held, expected in opened.processed():
                self.findings.note(f"{layer}.{own}", held, expected)
        finally:
            opened.undo()
            del self._open[layer]
        self._done.add(layer)
