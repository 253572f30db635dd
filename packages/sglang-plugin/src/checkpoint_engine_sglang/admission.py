"""Whether an update fits all models of one worker, and all workers of its engine; asked before anything changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from checkpoint_engine.sdk import CheckpointEngineError, TensorSpec, Update, WorkerError, fit
from checkpoint_engine_sglang import quantised
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.model_update import ModelUpdate
from checkpoint_engine_sglang.part import refuse_part
from checkpoint_engine_sglang.planned_model import PlannedModel

__all__ = ["LENIENT", "Admission", "Agree", "Plan", "Verdict"]

LENIENT = "CHECKPOINT_ENGINE_SGLANG_LENIENT"
"""Environment variable: `1` accepts a checkpoint that does not fit the model exactly, as far as SGLang itself does."""

_DRAFT_PREFIX = "draft_model."
"""Of tensors for a draft model that has a checkpoint of its own."""


class Verdict(msgspec.Struct, frozen=True):
    """What one worker has found before anything changes."""

    error: str = ""
    unplaced: list[str] = []
    """Tensors that go nowhere in this worker."""


Agree = Callable[[Verdict], list[Verdict]]
"""Tells all workers of the engine what this one found, and returns what all found."""

Plan = Callable[[Runner, Mapping[str, TensorSpec]], PlannedModel]
"""Finds out where the tensors of an update go in one model."""

_Open = TypeVar("_Open", bound=ModelUpdate)


class Admission:
    """Of one worker; lives as long as the worker."""

    def __init__(self, runners: Sequence[Runner], tensor_parallel_size: int) -> None:
        self._runners = runners
        self._tensor_parallel_size = tensor_parallel_size
        self.agree: Agree = lambda verdict: [verdict]

    def admit(
        self, update: Update, plan: Plan, enter: Callable[[PlannedModel, Mapping[str, str]], _Open]
    ) -> list[_Open]:
        """Checks the announced tensors with all workers of the engine.

        Args:
            update: What is announced.
            plan: Finds out where tensors go.
            enter: Makes a model that fits ready for its tensors, given by their names in the update and in the model.

        Raises:
            WeightsRejectedError: a tensor is unknown or does not fit, or a model would be left without weights.
            WorkerError: another worker refuses, or a layer cannot be updated.
        """
        entered: list[_Open] = []
        try:
            for runner in self._runners:
                names = self._meant_for(runner, update.tensors)
                if names:
                    _refuse_unsafe(runner)
                    specs = {own: update.tensors[name] for name, own in names.items()}
                    model = plan(runner, specs)
                    if update.partial:
                        refuse_part(model)
                        _refuse(fit.TOO_LARGE, model.too_large(specs, self._tensor_parallel_size))
                    else:
                        self._refuse_unfit(model, specs, [one.model.runner for one in entered])
                    entered.append(enter(model, names))
        except CheckpointEngineError as error:
            self.agree(Verdict(error=str(error)))
            raise
        _judge(self.agree(Verdict(unplaced=sorted(_unplaced(update, entered)))))
        return entered

    def _refuse_unfit(self, model: PlannedModel, specs: Mapping[str, TensorSpec], before: Sequence[Runner]) -> None:
        """Refuses what leaves a model incomplete; what it shares with a model `before` it, that one fills."""
        runner, dry_run = model.runner, model.dry_run
        shared = {tensor.untyped_storage().data_ptr() for other in before for tensor in other.model.parameters()}
        _refuse(fit.NOT_FILLED, *dry_run.missing(runner, shared))
        _refuse(fit.TOO_LARGE, model.too_large(specs, self._tensor_parallel_size))
        if dry_run.derived and model.rebuilt:
            raise WorkerError(
                f"{model.obstacle}, and SGLang has processed some of them: start it anew with the new weights"
            )

    def _meant_for(self, runner: Runner, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Name of a tensor -> its name in this model.

        A draft model with a checkpoint of its own gets only what is named for it, without the prefix.
        """
        named = {name: name.removeprefix(_DRAFT_PREFIX) for name in tensors if name.startswith(_DRAFT_PREFIX)}
        target = self._runners[0]
        if runner is target:
            return {name: name for name in tensors if name not in named}
        if named:
            return named
        return {name: name for name in tensors} if runner.path == target.path else {}


def _unplaced(update: Update, entered: Sequence[ModelUpdate]) -> set[str]:
    """Tensors that no model of this worker takes; none if that is not known of one of them."""
    found = set(update.tensors)
    for one in entered:
        dry_run, runner = one.model.dry_run, one.model.runner
        if dry_run.obstacle:
            return set()
        own_specs = {own: update.tensors[name] for name, own in one.names.items()}
        # Of a part, nothing may come in vain.
        left = own_specs.keys() - dry_run.placed if update.partial else dry_run.unplaced(own_specs, runner)
        found -= {name for name, own in one.names.items() if own not in left}
    return found


def _judge(verdicts: Sequence[Verdict]) -> None:
    failures = [f"worker {rank}: {verdict.error}" for rank, verdict in enumerate(verdicts) if verdict.error]
    if failures:
        raise WorkerError(f"another worker of this engine refuses the update ({'; '.join(failures)})")
    unknown = set(verdicts[0].unplaced).intersection(*(verdict.unplaced for verdict in verdicts[1:]))
    _refuse(fit.UNKNOWN, sorted(unknown))


def _refuse(problem: str, names: Sequence[str], halves: Sequence[str] = ()) -> None:
    lenient = os.environ.get(LENIENT) == "1"
    fit.refuse(problem, names, engine="SGLang", variable=LENIENT, lenient=lenient, halves=halves)


def _refuse_unsafe(runner: Runner) -> None:
    unsafe = quantised.find_unsafe(runner)
    if unsafe:
        raise WorkerError(
            f"the {runner.role} model has layers that cannot be updated while it serves ({unsafe}); start SGLang anew "
            f"with the new weights, or set {quantised.QUANTISED}=1 in its environment to try"
        )
