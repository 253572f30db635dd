"""Compares what a SGLang worker holds with what a checkpoint would make of it.

Parameters that SGLang leaves as the checkpoint has them are compared by the checksums of the plan's pieces. A layer
that it processes is opened in its first layout, filled by its loader, processed, compared, and put back as it was.
What the model derives from its weights is derived from the checkpoint's, beside what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from checkpoint_engine.sdk import Findings, Tensors, WeightsRejectedError
from checkpoint_engine.sdk.plans import Proof
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.derived import OverwritesWeightsError, derive_apart
from checkpoint_engine_sglang.dry_run import LOADER
from checkpoint_engine_sglang.model_update import SPLIT_UP, ModelUpdate
from checkpoint_engine_sglang.planned_model import ModelLadder, PlannedModel, inverted

__all__ = ["ModelComparison"]


class ModelComparison(ModelUpdate):
    """One model of a worker while a checkpoint passes by."""

    def __init__(self, model: PlannedModel, names: Mapping[str, str], *, partial: bool = False) -> None:
        """Makes it; of a checkpoint that is `partial`, nothing else is looked at.

        Raises:
            WeightsRejectedError: where tensors go is not known.
        """
        if model.dry_run.obstacle:
            raise WeightsRejectedError(f"the {model.runner.role} model cannot be compared: {model.obstacle}")
        if not compat.is_reloading_by_itself(model.runner.model) and not model.is_fed_whole:
            model.rebuild_too(_to_be_opened(model))
        super().__init__(model, names, ModelLadder(LOADER, model.runner.role))
        self._partial = partial
        self._proof = Proof(model.plan, model.device) if model.targets else None
        self._proved = {target for target in model.targets if not model.layer_of(target)}
        self.findings = Findings()
        fixed = {name for target, names in model.origins.items() if not model.layer_of(target) for name in names}
        # What cannot be filled alone, without others in place, is passed over.
        apart = not model.is_fed_whole
        self._missing = {layer: names for layer, names in self._missing.items() if apart and not names & fixed}
        self._waits = {layer for layer in self._missing if layer.endswith(SPLIT_UP)}
        self._layers_of = inverted(self._missing)

    def _sort(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """As for an update, but only layers that are open take anything, and only from the loader."""
        mine = [(self.names[name], tensor) for name, tensor in tensors if name in self.names]
        return mine, (), [pair for pair in mine if pair[0] in self._layers_of]

    def finish(self) -> None:
        """Compares what waited for all weights, and what stays in place.

        Raises:
            WorkerError: SGLang's processing failed, or the model did when it derived something.
        """
        if not self._partial:
            self._compare_derived()
        for layer in list(self._open):
            self._close_layer(layer)
        wrong: Mapping[str, str] = {}
        live = {target: tensor for target in self._proved if (tensor := self.model.live(target)) is not None}
        if self._proof is not None:
            for target, tensor in live.items():
                self._proof.find(target, tensor)
            wrong = self._proof.differing(self._proved)
        found = self.findings
        found.tensors += len(live)
        found.nbytes += sum(tensor.nbytes for tensor in live.values())
        found.different += sorted(wrong)
        for name, value in self.model.dry_run.constants.items() if not self._partial else ():
            held = self.model.live(name)
            if held is not None:
                found.note(name, held, value.to(held.device).expand(held.shape))
        if not self._partial:
            self._note_left_out({tensor.data_ptr() for tensor in live.values()})
        self.abort()

    def _note_left_out(self, compared: set[int]) -> None:
        origins, constants = self.model.origins, self.model.dry_run.constants
        for name in dict.fromkeys((*origins, *dict(self.model.runner.model.named_parameters()))):
            tensor = self.model.live(name)
            if name.rpartition(".")[0] in self._done or tensor is None or tensor.data_ptr() in compared:
                continue
            if tensor.numel() and name in origins:
                self.findings.leave_out(name, "only its loader can place it")
            elif tensor.numel() and name not in constants:
                self.findings.not_compared.append(f"{name} (the checkpoint has nothing for it)")

    def _compare_derived(self) -> None:
        """Derives from the weights of layers that are open, and from others as they are (they are compared too)."""
        runner, rebuilt = self.model.runner, self.model.rebuilt
        if self.model.dry_run.derived:
            self._leave_out_derived(f"its loader derives {self.model.dry_run.derived[0]} itself")
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
            self._note(one.name, one.held, one.expected)

    def _note(self, name: str, held: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        """Compares two tensors; of those that there is only one of, there should be none."""
        if held is None or expected is None:
            self.findings.tensors += 1
            self.findings.different.append(name)
        else:
            self.findings.note(name, held, expected)

    def _leave_out_derived(self, why: str) -> None:
        self.findings.leave_out("what the model derives from its weights", why)

    def _close_layer(self, layer: str) -> None:
        opened = self._open[layer]
        try:
            is_processed = compat.processing_of(opened.module) is not None
            for own, held, expected in opened.processed():
                name = f"{layer}.{own}".lstrip(".")
                if is_processed or name in self.model.origins:
                    self._note(name, held, expected)
        finally:
            opened.undo()
            del self._open[layer]
        self._done.add(layer)


def _to_be_opened(model: PlannedModel) -> set[str]:
    """Layers that the plan does not reach as they are, and those that latent attention derives something from."""
    by_loader = {target.rpartition(".")[0] for target in model.origins if target not in model.targets}
    split_up = {target.rpartition(".")[0] for target in model.origins if target.rpartition(".")[0].endswith(SPLIT_UP)}
    return by_loader | split_up if compat.deriving_modules(model.runner.model) else by_loader
