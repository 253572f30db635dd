"""Puts the tensors of an update into one SGLang worker: into the served model and its draft models at once."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch

from checkpoint_engine.engine.adapter import Adapter, TensorSpec, Update
from checkpoint_engine.engine.findings import Findings
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError, WeightsRejectedError, WorkerError
from checkpoint_engine_sglang import compat, places, quantised
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.load import Load
from checkpoint_engine_sglang.plans import Model, Plans
from checkpoint_engine_sglang.verifying import Comparison, to_be_opened

logger = logging.getLogger(__name__)

LENIENT = "CHECKPOINT_ENGINE_SGLANG_LENIENT"
"""Environment variable: `1` accepts a checkpoint that does not fit the model exactly, as far as SGLang itself does."""

DRAFT_PREFIX = "draft_model."
"""Of tensors for a draft model that has a checkpoint of its own."""

_MOST_NAMED = 8


class Verdict(msgspec.Struct, frozen=True):
    """What one worker has found before anything changes."""

    error: str = ""
    unplaced: list[str] = []
    """Tensors that go nowhere in this worker."""


Agree = Callable[[Verdict], list[Verdict]]
"""Tells all workers of the engine what this one found, and returns what all found."""


class SGLangAdapter:
    """The adapter of one worker; lives as long as the worker. See `checkpoint_engine.engine.adapter.Adapter`."""

    def __init__(self, runners: Sequence[Runner], tensor_parallel_size: int) -> None:
        self._runners = runners
        self._tensor_parallel_size = tensor_parallel_size
        self.dirty = False
        """Whether the weights may be a mixture of old and new."""
        self.version = ""
        """Of the weights held, as far as they came through here."""
        self.agree: Agree = lambda verdict: [verdict]
        self._plans = Plans()
        self._update: Update | None = None
        self._loads: list[Load] = []
        self._touched = False
        self._seconds = {"check": 0.0, "load": 0.0, "finish": 0.0}

    # -- the protocol

    def begin(self, update: Update) -> None:
        """Checks the announced tensors with all workers of the engine, then makes the models ready for them.

        Raises:
            WeightsRejectedError: a tensor is unknown or does not fit, or a model would be left without weights.
            WorkerError: another worker refuses, or a layer cannot be updated.
        """
        self._update, self._loads, self._touched = update, [], False
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        start = time.perf_counter()
        try:
            self._loads = self._check(update)
        except CheckpointEngineError as error:
            self.agree(Verdict(error=str(error)))
            raise
        unplaced = self._unplaced(update)
        self._judge(self.agree(Verdict(unplaced=sorted(unplaced))))
        self._seconds["check"] = time.perf_counter() - start
        for load in self._loads:
            load.begin()

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Only what the plan copies, once it is trusted and nothing is left to SGLang's loaders."""
        return self._loads[0].wanted(bucket) if len(self._loads) == 1 else None

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Gives tensors to SGLang's loaders."""
        if self._update is None:
            raise CheckpointStateError("load was called outside of an update")
        start = time.perf_counter()
        self._touched = True
        for load in self._loads:
            load.take(tensors)
        self._seconds["load"] += time.perf_counter() - start

    def finish(self) -> Mapping[str, str | int | float]:
        """Checks that everything came, and completes the models.

        Raises:
            WeightsRejectedError: tensors are missing.
            WorkerError: SGLang's processing of the weights fails; the message names the layer.
        """
        update = self._update
        if update is None:
            raise CheckpointStateError("finish was called outside of an update")
        start = time.perf_counter()
        for load in self._loads:
            load.finish()
        self._seconds["finish"] = time.perf_counter() - start
        self.dirty, self.version, self._update = False, update.version, None
        self._touched = True  # what was there before is gone
        return {
            "sglang": places.version(),
            "tensors": len(update.tensors),
            "models": len(self._loads),
            **self._ways(),
            **{f"{step}_seconds": round(seconds, 6) for step, seconds in self._seconds.items()},
        }

    def abort(self) -> bool:
        """Gives the update up; SGLang loads in place, so what was written stays written."""
        for load in self._loads:
            load.abort()
        self._update, self._loads = None, []
        self._plans.forget()
        self.dirty = self.dirty or self._touched
        return not self.dirty

    def verifier(self) -> Adapter:
        """See `checkpoint_engine.engine.adapter.Verifiable`."""
        verifier = SGLangVerifier(self._runners, self._tensor_parallel_size)
        verifier.agree = self.agree
        return verifier

    # -- inside

    def _check(self, update: Update) -> list[Load]:
        loads: list[Load] = []
        owned: set[int] = set()
        for runner in self._runners:
            names = self._meant_for(runner, update.tensors)
            if not names:
                continue
            unsafe = quantised.find_unsafe(runner)
            if unsafe:
                raise WorkerError(
                    f"the {runner.role} model has layers that cannot be updated while it serves ({unsafe}); start "
                    f"SGLang anew with the new weights, or set {quantised.QUANTISED}=1 in its environment to try"
                )
            specs = {own: update.tensors[name] for name, own in names.items()}
            model = self._plans.of(runner, specs)
            if model.trial is not None:
                refuse(
                    "the checkpoint does not fill these parameters of the model",
                    model.trial.missing(runner, frozenset(owned), quantised=quantised.is_quantised(runner)),
                )
                refuse(
                    "these tensors are larger than the model's parameters",
                    model.trial.too_large(specs, self._tensor_parallel_size),
                )
            mode = self._mode(model, update.reload)
            model.prepare(mode)
            owned.update(tensor.untyped_storage().data_ptr() for tensor in runner.model.parameters())
            loads.append(self._open(model, names, mode))
        return loads

    def _mode(self, model: Model, reload: str) -> str:
        """Copies do not derive anything; what a loader derives while it loads, only it can bring about."""
        derived = () if model.trial is None else model.trial.derived
        if not derived:
            return reload
        described = f"the loader of the {model.runner.role} model derives {derived[0]} from its weights itself"
        if model.rebuilt:
            raise WorkerError(f"{described}, and SGLang has processed some of them: start it anew with the new weights")
        if reload == "plan":
            raise WeightsRejectedError(f"{described}, which no plan does; use --reload auto")
        return "loader"

    def _open(self, model: Model, names: Mapping[str, str], reload: str) -> Load:
        return Load(model, names, planned=reload != "loader")

    def _ways(self) -> dict[str, str | int | float]:
        """How the served model's weights were taken over."""
        load = self._loads[0]
        flaws = {} if load.way == "loader" else load.model.flaws()
        why = "; ".join(f"{name}: {reason}" for name, reason in list(flaws.items())[:_MOST_NAMED])
        return {
            "reload": load.way,
            "plan_bytes": load.nbytes["plan"],
            "loader_bytes": load.nbytes["loader"],
            "loader_reason": "the first update proves the plan" if load.way == "proof" else why,
            "rebuilt_layers": len(load.model.rebuilt),
        }

    def _meant_for(self, runner: Runner, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Name of a tensor -> its name in this model.

        A draft model with a checkpoint of its own gets only what is named for it, without the prefix.
        """
        named = {name: name.removeprefix(DRAFT_PREFIX) for name in tensors if name.startswith(DRAFT_PREFIX)}
        target = self._runners[0]
        if runner is target:
            return {name: name for name in tensors if name not in named}
        if named:
            return named
        return {name: name for name in tensors} if runner.path == target.path else {}

    def _unplaced(self, update: Update) -> set[str]:
        """Tensors that no model of this worker takes; none if that is not known of one of them."""
        found = set(update.tensors)
        for load in self._loads:
            trial, runner = load.model.trial, load.model.runner
            if trial is None:
                return set()
            left = trial.unplaced({own: update.tensors[name] for name, own in load.names.items()}, runner)
            found -= {name for name, own in load.names.items() if own not in left}
        return found

    def _judge(self, verdicts: Sequence[Verdict]) -> None:
        failures = [f"worker {rank}: {verdict.error}" for rank, verdict in enumerate(verdicts) if verdict.error]
        if failures:
            raise WorkerError(f"another worker of this engine refuses the update ({'; '.join(failures)})")
        unknown = set(verdicts[0].unplaced).intersection(*(verdict.unplaced for verdict in verdicts[1:]))
        refuse("the model does not know these tensors", sorted(unknown))


class SGLangVerifier(SGLangAdapter):
    """See `checkpoint_engine.engine.adapter.Verifiable`; made anew for each comparison."""

    def finish(self) -> Mapping[str, str | int | float]:
        """Tells what was found.

        Raises:
            WeightsRejectedError: tensors are missing.
            WorkerError: SGLang's processing of the weights fails; the message names the layer.
        """
        findings = Findings()
        for load in self._loads:
            load.finish()
            if isinstance(load, Comparison):
                findings.add(load.findings)
        return findings.details()

    def abort(self) -> bool:
        """Ends the comparison; the engine holds what it held."""
        for load in self._loads:
            load.abort()
        return True

    def _mode(self, model: Model, reload: str) -> str:
        super()._mode(model, "auto")  # what it refuses cannot be compared either
        return reload

    def _open(self, model: Model, names: Mapping[str, str], reload: str) -> Load:
        del reload
        if model.trial is None:
            raise WeightsRejectedError(
                f"the {model.runner.role} model cannot be compared: its loader needs data to tell where tensors go"
            )
        if not compat.is_reloading_by_itself(model.runner.model) and not model.trial.derived:
            model.rebuild_too(to_be_opened(model))
        return Comparison(model, names, planned=True)


def refuse(problem: str, names: Sequence[str]) -> None:
    """Raises if there are any names, unless the user accepts such checkpoints.

    Raises:
        WeightsRejectedError: it says what is wrong with which tensors.
    """
    if not names:
        return
    message = f"{problem}: {listed(names)}"
    if os.environ.get(LENIENT) == "1":
        logger.warning("%s (accepted, %s=1)", message, LENIENT)
        return
    raise WeightsRejectedError(
        f"{message}; is the checkpoint complete, and of the served model? ({LENIENT}=1 in the engine's environment "
        "accepts it as far as SGLang does; parameters without weights then keep what they hold)"
    )


def listed(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
