"""What takes the weights of an update in one SGLang worker: into the served model and its draft models at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from checkpoint_engine.sdk import (
    ComparisonFigures,
    ComparisonSink,
    EngineSink,
    Findings,
    Tensors,
    TensorSpec,
    Update,
    UpdateFigures,
    WeightSink,
    WeightsState,
)
from checkpoint_engine.sdk.plans import KeptProofs
from checkpoint_engine_sglang import installation
from checkpoint_engine_sglang.admission import Admission
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.dry_run import LOADER, run_dry
from checkpoint_engine_sglang.model_comparison import ModelComparison
from checkpoint_engine_sglang.model_update import ModelUpdate
from checkpoint_engine_sglang.planned_model import ModelLadder, PlannedModel
from checkpoint_engine_sglang.serving import serving

__all__ = ["SGLangSink"]


class SGLangSink(EngineSink):
    """The sink of one worker; lives as long as the worker. See `checkpoint_engine.contract.engine_sink.EngineSink`."""

    takes_parts = True

    def __init__(self, runners: Sequence[Runner], tensor_parallel_size: int, place: str = "") -> None:
        """Begins with what the engine started with; `place` is the worker's among the others, as people know it."""
        super().__init__()
        self.admission = Admission(runners, tensor_parallel_size)

        def new_ladder(runner: Runner) -> ModelLadder:
            return ModelLadder(LOADER, runner.role, lambda: KeptProofs(serving(runner, place)))

        self._ladders = {runner.role: new_ladder(runner) for runner in runners}
        self._part_ladders = {runner.role: new_ladder(runner) for runner in runners}
        """Of updates that bring some tensors only: they must not forget what is known of whole ones."""
        self._updates: list[ModelUpdate] = []

    def check(self, update: Update) -> None:
        """Checks the announced tensors with all workers of the engine; see `Admission.admit`."""
        ladders = self._part_ladders if update.partial else self._ladders

        def plan(runner: Runner, specs: Mapping[str, TensorSpec]) -> PlannedModel:
            return ladders[runner.role].model_for(runner, specs)

        def enter(model: PlannedModel, names: Mapping[str, str]) -> ModelUpdate:
            ladder = ladders[model.runner.role]
            ladder.begin(update.reload, model, compared=update.compared)
            return ModelUpdate(model, names, ladder, partial=update.partial)

        self._updates = []
        self._updates = self.admission.admit(update, plan, enter)

    def open(self, update: Update) -> None:
        """Makes the models ready where it is not known which layer needs which tensors."""
        del update
        for one in self._updates:
            one.begin()

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Only what the plan copies, once it is trusted and nothing is left to SGLang's loaders."""
        return self._updates[0].wanted(bucket) if len(self._updates) == 1 else None

    def take(self, tensors: Tensors) -> None:
        """Copies tensors, or gives them to SGLang's loaders."""
        for one in self._updates:
            one.take(tensors)

    def complete(self, update: Update) -> UpdateFigures:
        """Completes the models; the figures are the served model's.

        Raises:
            WorkerError: SGLang's processing of the weights fails; the message names the layer.
        """
        del update
        for one in self._updates:
            one.finish()
        figures = self._updates[0].figures if self._updates else UpdateFigures()
        engine = {"sglang": installation.version(), "models": len(self._updates), **figures.engine}
        self._updates = []
        return msgspec.structs.replace(figures, engine=engine)

    def restore(self) -> bool:
        """Gives the update up; SGLang loads in place, so what was written stays written."""
        kept = self.interrupted and all(one.only_copied for one in self._updates)
        ladders = {one.ladder for one in self._updates} if kept else set[ModelLadder]()
        for one in self._updates:
            one.abort()
        self._updates = []
        for ladder in (*self._ladders.values(), *self._part_ladders.values()):
            if ladder in ladders:
                ladder.interrupted()
            else:
                ladder.failed()
        return self.state is WeightsState.BEGUN

    def others_brought(self, version: str) -> None:
        """SGLang's own routes have put other weights there; what was learned of the models is learned anew."""
        self.life.others_brought(version)
        for ladder in (*self._ladders.values(), *self._part_ladders.values()):
            ladder.failed()

    def verifier(self) -> WeightSink:
        """See `checkpoint_engine.contract.sink.Verifiable`."""
        return _SGLangComparison(self)


class _SGLangComparison(ComparisonSink):
    """Compares the weights of one worker; made anew for each comparison."""

    takes_parts = True

    def __init__(self, sink: SGLangSink) -> None:
        super().__init__(sink)
        self._admission = sink.admission
        self._models: list[ModelComparison] = []

    def check(self, update: Update) -> None:
        """Refuses what an update would not take either."""
        self._models = self._admission.admit(
            update,
            lambda runner, specs: PlannedModel(runner, run_dry(runner, specs)),
            lambda model, names: ModelComparison(model, names, partial=update.partial),
        )

    def open(self, update: Update) -> None:
        """Nothing is to be made ready."""

    def take(self, tensors: Tensors) -> None:
        """Compares what these tensors complete."""
        for model in self._models:
            model.take(tensors)

    def complete(self, update: Update) -> ComparisonFigures:
        """Tells what was found.

        Raises:
            WorkerError: SGLang's processing of the weights fails; the message names the layer.
        """
        del update
        findings = Findings()
        for model in self._models:
            model.finish()
            findings.add(model.findings)
        return findings.figures()

    def restore(self) -> bool:
        """Closes what is open; the engine holds what it held."""
        for model in self._models:
            model.abort()
        return True
