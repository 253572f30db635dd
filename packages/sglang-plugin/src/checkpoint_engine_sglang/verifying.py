"""Compares what a SGLang worker holds with what a checkpoint would make of it.

Parameters that SGLang leaves as the checkpoint has them are compared by the checksums of the plan's pieces. A layer
that it processes is opened in its first layout, filled by its loader, processed, compared, and put back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

from checkpoint_engine.engine.findings import Findings
from checkpoint_engine_sglang.load import Load, Tensors
from checkpoint_engine_sglang.plans import Model


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
            if not lacking and layer in self._open:
                self._close_layer(layer)

    def finish(self) -> None:
        """Compares what stays in place.

        Raises:
            WeightsRejectedError: a tensor is missing.
        """
        self._refuse_lost()
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
        if hasattr(self.model.runner.model, "post_load_weights"):
            found.not_compared.append("what the model derives from its weights")
        self.abort()

    def _close_layer(self, layer: str) -> None:
        opened = self._open[layer]
        try:
            for own, held, expected in opened.processed():
                self.findings.note(f"{layer}.{own}", held, expected)
        finally:
            opened.undo()
            del self._open[layer]
        self._done.add(layer)
