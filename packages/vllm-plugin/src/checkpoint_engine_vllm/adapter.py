"""Puts the tensors of an update into one vLLM worker."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence

import torch

from checkpoint_engine.engine.adapter import TensorSpec, Update
from checkpoint_engine.errors import CheckpointStateError, WeightsRejectedError
from checkpoint_engine.reload.delivery import names_of, nbytes_of
from checkpoint_engine_vllm import compat, formats
from checkpoint_engine_vllm.draft import NAME, DraftReload, open_draft
from checkpoint_engine_vllm.layers import Way
from checkpoint_engine_vllm.loadplan import LoadPlan, Planner, missing_parameters
from checkpoint_engine_vllm.planned import PlannedReload
from checkpoint_engine_vllm.plans import AnyReload, Plans
from checkpoint_engine_vllm.protocols import Worker
from checkpoint_engine_vllm.proving import ProvingReload
from checkpoint_engine_vllm.repairs import CpuRepairs, Repairs
from checkpoint_engine_vllm.verifying import Verifier

logger = logging.getLogger(__name__)

LENIENT = "CHECKPOINT_ENGINE_VLLM_LENIENT"
"""Environment variable: `1` accepts a checkpoint that does not fit the model exactly, as far as vLLM itself does."""

_SERVED = "served"
"""The served model, among a worker's plans."""
_UNFIT = "is the checkpoint complete, and of the served model?"
_STALE = "this vLLM cannot reload what these layers keep beside their parameters"
_SCALES = "this vLLM cannot reload scales of attention"
_MISSING = "the checkpoint does not fill these parameters of the model"
_MOST_NAMED = 8


class VllmAdapter:
    """The adapter of one worker; lives as long as the worker. See `checkpoint_engine.engine.adapter.Adapter`."""

    def __init__(self, worker: Worker, planner: Planner | None = None) -> None:
        self._worker = worker
        self.dirty = False
        """Whether the weights may be a mixture of old and new."""
        self.version = ""
        """Of the weights held, as far as they came through here."""
        self._planner = planner or Planner()
        self._plans = Plans()
        self._plan: LoadPlan | None = None
        self._fitting: LoadPlan | None = None
        """The last plan whose tensors were found to fit the served model."""
        self._target: AnyReload | None = None
        self._draft: DraftReload | None = None
        self._update: Update | None = None
        self._delivered: set[str] = set()
        self._nbytes = 0
        self._seconds = {"check": 0.0, "load": 0.0, "finish": 0.0}

    # -- the protocol

    def begin(self, update: Update) -> None:
        """Checks the announced tensors, then makes the models ready for them.

        Raises:
            WeightsRejectedError: a tensor is unknown to the model, or the model would be left without weights.
            MissingDependencyError: this vLLM cannot reload weights.
        """
        compat.layerwise()
        self._update, self._delivered, self._nbytes = update, set(), 0
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        start = time.perf_counter()
        with compat.engine_context(self._worker):
            draft = open_draft(self._worker, update.tensors, self._planner, self._plans, update.reload)
            served = update.tensors
            if draft is not None:
                served = {name: spec for name, spec in served.items() if not draft.only(name)}
            self._check(served, draft)
            self._seconds["check"] = time.perf_counter() - start
            self._target = self._plans.open(
                _SERVED,
                update.reload,
                self._plan,
                compat.target_model(self._worker),
                self._worker.model_config,
                self._repairs(),
            )
            self._draft = draft
            if not self.version:
                compat.forget_dummy_scales(self._worker, compat.target_model(self._worker))
            self._target.begin()
            if draft is not None:
                draft.begin(self._repairs())

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Only what the plan copies, once it is trusted and nothing is left to vLLM's loader."""
        target = self._target
        return target.wanted(bucket) if isinstance(target, PlannedReload) and self._draft is None else None

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Gives tensors to vLLM's loaders: those of the served model and of its draft model."""
        target, draft = self._target, self._draft
        if target is None:
            raise CheckpointStateError("load was called outside of an update")
        start = time.perf_counter()
        with compat.engine_context(self._worker):
            target.load(tensors if draft is None else draft.others(tensors))
            if draft is not None:
                draft.load(tensors)
        self._delivered.update(names_of(tensors))
        self._nbytes += nbytes_of(tensors)
        self._seconds["load"] += time.perf_counter() - start

    def finish(self) -> Mapping[str, str | int | float]:
        """Checks that everything came, and completes the models.

        Raises:
            WeightsRejectedError: tensors are missing; nothing was completed.
        """
        target, draft, update = self._target, self._draft, self._update
        if target is None or update is None:
            raise CheckpointStateError("finish was called outside of an update")
        start = time.perf_counter()
        if len(self._delivered) < len(update.tensors):
            lost = [name for name in update.tensors if name not in self._delivered]
            raise WeightsRejectedError(f"announced but not delivered: {_listed(lost)}")
        with compat.engine_context(self._worker):
            if self._plan is None or not self._plan.is_complete:
                self._refuse(_MISSING, target.incomplete())
            if draft is not None:
                self._refuse(_MISSING, draft.incomplete())
            target.finish()
            if draft is not None:
                draft.finish()
            self._after_new_weights()
        self._seconds["finish"] = time.perf_counter() - start
        details = self._details(target, draft)
        for name in (_SERVED, NAME):
            self._plans.succeeded(name)
        self.dirty, self.version = False, update.version
        self._target = self._draft = None
        return details

    def abort(self) -> bool:
        """Puts the old weights back where layers are not complete; returns whether all weights are the old ones."""
        target, draft, update = self._target, self._draft, self._update
        self._target = self._draft = self._update = None
        if target is None:
            was_finished = update is not None and bool(self._delivered)
            return not self.dirty and not was_finished
        for name in (_SERVED, NAME):
            self._plans.failed(name)
        intact = False
        try:
            with compat.engine_context(self._worker):
                # The served model first: layers that it shares with the draft model are its own to put back.
                target_intact = target.abort()
                intact = (draft is None or draft.abort()) and target_intact
        finally:
            # A worker that held a mixture before holds one still.
            self.dirty = self.dirty or not intact
        return not self.dirty

    def verifier(self) -> Verifier:
        """See `checkpoint_engine.engine.adapter.Verifiable`."""
        return Verifier(self._worker, VllmAdapter(self._worker, self._planner))

    # -- inside

    def _repairs(self) -> Repairs:
        return CpuRepairs() if compat.on_cpu(self._worker) else Repairs()

    def _check(self, tensors: Mapping[str, TensorSpec], draft: DraftReload | None) -> None:
        """Refuses what would not fit, before anything has changed."""
        config, model_config = self._worker.vllm_config, self._worker.model_config
        served = compat.target_model(self._worker)
        if not self.version:
            graphs = compat.captures_graphs(self._worker)
            self._refuse(_STALE, formats.unreloadable(served, graphs=graphs), "old or freed memory would be read")
        self._plan = plan = self._planner.plan(_SERVED, config, model_config, tensors, served)
        if plan is not None and plan is not self._fitting and plan.is_complete:
            quantised = config.quant_config is not None
            self._refuse(_MISSING, missing_parameters(plan, served, quantised=quantised))
            self._refuse("these tensors are larger than the model's parameters", self._too_large(plan, tensors))
            self._fitting = plan
        if plan is not None and not compat.reloads_attention_scales():
            self._refuse(_SCALES, _attention_scales(plan, served), "leave them out, or use vLLM 0.20 or newer")
        if draft is not None:
            self._refuse(_MISSING, draft.missing())

    def _too_large(self, plan: LoadPlan, tensors: Mapping[str, TensorSpec]) -> list[str]:
        """Tensors of which all workers together take only a part: vLLM's loaders cut silently what is too long."""
        parallel = self._worker.vllm_config.parallel_config
        workers = int(parallel.world_size) * int(parallel.data_parallel_size)
        return [
            f"{name} (shape {list(tensors[name].shape)}, {taken} elements taken)"
            for name, taken in plan.taken.items()
            if taken * workers < math.prod(tensors[name].shape)
        ]

    def _refuse(self, problem: str, names: Sequence[str], hint: str = _UNFIT) -> None:
        if not names:
            return
        message = f"{problem}: {_listed(names)}"
        if os.environ.get(LENIENT) == "1":
            logger.warning("%s (accepted, %s=1)", message, LENIENT)
            return
        raise WeightsRejectedError(
            f"{message}; {hint} ({LENIENT}=1 in the engine's environment accepts it as far as vLLM does; parameters "
            "without weights then keep what they hold)"
        )

    def _after_new_weights(self) -> None:
        """What vLLM itself does after it has replaced weights."""
        reset = getattr(self._worker.model_runner, "reset_lora_state", None)
        if reset is not None:
            reset()

    def _details(self, target: AnyReload, draft: DraftReload | None) -> dict[str, str | int | float]:
        by_loader = target.loader_bytes if isinstance(target, PlannedReload) else self._nbytes
        return {
            "vllm": compat.version(),
            "tensors": len(self._delivered),
            "draft_tensors": 0 if draft is None else draft.tensors,
            "reload": target.way,
            "plan_bytes": self._nbytes - by_loader,
            "loader_bytes": by_loader,
            "loader_reason": self._why_by_loader(target),
            "cloned_bytes": target.cloned_bytes + (0 if draft is None else draft.cloned_bytes),
            **{f"{step}_seconds": round(seconds, 6) for step, seconds in self._seconds.items()},
        }

    def _why_by_loader(self, target: AnyReload) -> str:
        layers = self._plans.layers(_SERVED)
        if isinstance(target, ProvingReload):
            return "the first update proves the plan"
        if layers is None or not isinstance(target, PlannedReload):
            return "" if layers is None else layers.obstacle
        left = layers.of(Way.LOADER)[:_MOST_NAMED]
        return "; ".join(f"{layer.name}: {layer.reason}" for layer in left)


def _attention_scales(plan: LoadPlan, served: torch.nn.Module) -> list[str]:
    modules = compat.modules_by_name(served)
    owners = {target: modules.get(target.rpartition(".")[0]) for target in plan.reload.recording.origins}
    return [target for target, owner in owners.items() if owner is not None and compat.is_attention(owner)]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
