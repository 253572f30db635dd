"""Puts the tensors of an update into one vLLM worker."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from checkpoint_engine.sdk import (
    CheckpointStateError,
    EngineSink,
    Tensors,
    TensorSpec,
    Update,
    UpdateFigures,
    WeightsRejectedError,
    listed,
)
from checkpoint_engine.sdk.fit import NOT_FILLED, TOO_LARGE, missing, refuse, torn
from checkpoint_engine.sdk.plans import Rung
from checkpoint_engine_vllm import compat, formats
from checkpoint_engine_vllm.adapters import renew_adapters, wrapped_experts
from checkpoint_engine_vllm.aliases import Aliases
from checkpoint_engine_vllm.draft import NAME, PREFIX, DraftReload, open_draft
from checkpoint_engine_vllm.loadplan import LoadPlan, Planner, missing_parameters
from checkpoint_engine_vllm.noise import Noise
from checkpoint_engine_vllm.part import Part
from checkpoint_engine_vllm.planned import PlannedReload
from checkpoint_engine_vllm.plans import AnyReload, LayersLadder, open_reload
from checkpoint_engine_vllm.protocols import Worker
from checkpoint_engine_vllm.reload import is_torn
from checkpoint_engine_vllm.repairs import CpuRepairs, Repairs
from checkpoint_engine_vllm.serving import kept_proofs
from checkpoint_engine_vllm.ties import Ties
from checkpoint_engine_vllm.verifying import VllmVerifier

__all__ = ["LENIENT", "VllmSink"]

LENIENT = "CHECKPOINT_ENGINE_VLLM_LENIENT"
"""Environment variable: `1` accepts a checkpoint that does not fit the model exactly, as far as vLLM itself does."""

_SERVED = "served"
"""The served model, among a worker's plans."""
_PART = "served, in part"
"""That, where an update brings some tensors only."""
_TORN = "these tensors are not all of what these parameters are made of"
_STALE = "this vLLM cannot reload what these layers keep beside their parameters"
_MOVING = (
    "this vLLM moves experts between its workers (--enable-eplb), and its loaders put new weights where they were when "
    "it started; serve without it, or start the engine anew with this checkpoint"
)
_WRAPPED = (
    "vLLM has wrapped experts for LoRA, whose wrappers go on with what the engine started with: leave them out of "
    "--lora-target-modules, or start the engine anew with this checkpoint"
)
_NOISE = (
    "a start with dummy weights has filled these buffers with noise, and a trainer's named_parameters() does not list "
    "them: bring its named_buffers() too; where checkpoints have none of them either, start the engine with weights"
)
_ASLEEP = "its weights sleep: wake them (tags=weights; the cache may sleep on), and update again"
_SCALES = "this vLLM cannot reload scales of attention"


class VllmSink(EngineSink):
    """The sink of one worker; see `checkpoint_engine.contract.engine_sink`."""

    takes_parts = True

    def __init__(self, worker: Worker, planner: Planner | None = None, noise: Noise | None = None) -> None:
        super().__init__()
        self._worker = worker
        self._noise = noise
        """Known from the first update or comparison on."""
        self._planner = planner or Planner()
        self._ladder = LayersLadder(_SERVED, lambda: kept_proofs(worker))
        self._part_ladder = LayersLadder(_SERVED)
        """Of updates that bring some tensors only: they must not forget what is known of whole ones."""
        self._draft_ladder = LayersLadder(NAME)
        self._plan: LoadPlan | None = None
        self._fitting: LoadPlan | None = None
        """The last plan whose tensors were found to fit the served model."""
        self._target: AnyReload | None = None
        self._draft: DraftReload | None = None
        self._part: Part | None = None
        self._aliases, self._ties = Aliases(None, torch.nn.Module()), Ties(None, torch.nn.Module())

    def record_ahead(self) -> int:
        """Records the plan for the tensors that engines of this kind got last, before they come; says of how many.

        None are known where no proof is kept. An update that brings others records its own plan.

        Raises:
            WeightsRejectedError: this engine's loader does not know them.
        """
        kept = kept_proofs(self._worker)
        tensors = None if kept is None else kept.last()
        if not tensors:
            return 0
        with self.running():
            model = compat.target_model(self._worker)
            self._planner.plan(_SERVED, self._worker.vllm_config, self._worker.model_config, tensors, model)
        return len(tensors)

    def running(self) -> AbstractContextManager[object]:
        """Makes vLLM's configuration the current one, as it is while vLLM loads by itself."""
        return compat.engine_context(self._worker)

    def check(self, update: Update) -> None:
        """Refuses what would not fit, before anything has changed.

        Raises:
            WeightsRejectedError: a tensor is unknown to the model, the model would be left without weights, or nothing
                but the plan may be used and it does not cover the model.
            MissingDependencyError: this vLLM cannot reload weights.
        """
        compat.layerwise()
        if compat.weights_sleep(self._worker):
            raise WeightsRejectedError(_ASLEEP)
        self._made_up()
        if compat.moves_experts(self._worker):
            raise WeightsRejectedError(_MOVING)
        if experts := wrapped_experts(compat.target_model(self._worker)):
            raise WeightsRejectedError(f"{_WRAPPED} (here {experts[0]})")
        self._target = self._part = None
        self._check_reloadable()
        if update.partial:
            self._check_part(update)
            return
        if update.open_ended:
            self._open_by_loader(update)
            return
        self._draft = draft = open_draft(self._worker, update.tensors, self._planner, self._draft_ladder, update.reload)
        served = update.tensors
        if draft is not None:
            served = {name: spec for name, spec in served.items() if not draft.only(name)}
        self._check_served(served)
        if draft is not None:
            _refuse(NOT_FILLED, draft.missing(missing), draft.missing(torn))
        model, model_config = compat.target_model(self._worker), self._worker.model_config
        self._aliases, self._ties = Aliases(self._plan, model), Ties(self._plan, model)
        why = self._planner.obstacle(_SERVED)
        self._target = open_reload(
            self._ladder,
            update.reload,
            self._plan,
            model,
            model_config,
            self._repairs(),
            obstacle=why,
            tensors=served if draft is None else None,  # beside a draft model, both prove theirs
            compared=update.compared,
        )

    def open(self, update: Update) -> None:
        """Makes the models ready for new weights."""
        del update
        if not self.version:
            compat.forget_dummy_scales(self._worker, compat.target_model(self._worker))
        if self._part is not None and self._part_ladder.rung is not Rung.PLAN:
            self._part.watch()
        self._opened().begin()
        if self._draft is not None:
            self._draft.begin(self._repairs())

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """Only what the plan copies, once it is checked and nothing is left to vLLM's loader."""
        if self._target is None or self._draft is not None or self._ties.watches(bucket):
            return None
        return self._target.wanted(bucket)

    def take(self, tensors: Tensors) -> None:
        """Gives tensors to the served model and to its draft model."""
        target, draft = self._opened(), self._draft
        target.load(tensors if draft is None else draft.others(tensors))
        self._aliases.load(tensors)
        self._ties.load(tensors)
        if draft is not None:
            draft.load(tensors)

    def complete(self, update: Update) -> UpdateFigures:
        """Completes the models.

        Raises:
            WeightsRejectedError: parameters got nothing, and nothing was completed; or buffers are noise still.
        """
        del update
        target, draft = self._opened(), self._draft
        if self._plan is None or not self._plan.is_complete:
            _refuse_incomplete(target.incomplete())
        if draft is not None:
            _refuse_incomplete(draft.incomplete())
        self._ties.check()
        target.finish()
        if draft is not None:
            draft.finish()
        if self._plan is None or not self._plan.is_complete:
            _refuse(NOT_FILLED, [f"{name} (nothing)" for name in self._made_up().left()], hint=_NOISE)
        renew_adapters(compat.target_model(self._worker))
        if self._part is not None:
            self._part.check()
        figures = self._figures(target, draft)
        for ladder in (self._part_ladder,) if self._part is not None else (self._ladder, self._draft_ladder):
            ladder.succeeded()
        self._target = self._draft = self._part = None
        return figures

    def restore(self) -> bool:
        """Puts the old weights back where layers are not complete; returns whether all weights are the old ones."""
        target, draft, kept = self._target, self._draft, self._only_copied()
        self._target = self._draft = self._part = None
        for ladder in (self._part_ladder, self._draft_ladder, *(() if kept else (self._ladder,))):
            ladder.failed()
        if target is None:
            return True
        # The served model first: layers that it shares with the draft model are its own to put back.
        try:
            intact = target.abort()
        except BaseException:
            self._ladder.failed()
            raise
        if kept:
            self._ladder.interrupted()
        if intact:
            self._aliases.restore()
        return (draft is None or draft.abort()) and intact

    def verifier(self) -> VllmVerifier:
        """See `checkpoint_engine.contract.sink.Verifiable`."""
        noise = self._made_up()
        return VllmVerifier(self._worker, self, VllmSink(self._worker, self._planner, noise), noise)

    def put_back(self) -> None:
        """Gives tensors that show a parameter in another way what they held before the update."""
        self._aliases.restore()

    def sources(self) -> Mapping[str, Collection[str]] | None:
        """What comes into each parameter and buffer in the update under way; None where that is not known."""
        if self._plan is None:
            return None
        found: dict[str, Collection[str]] = {**self._plan.reload.recording.origins}
        if self._draft is not None:
            found |= {PREFIX + name: tensors for name, tensors in self._draft.sources().items()}
        return found

    # -- inside

    def _only_copied(self) -> bool:
        """Whether the update under way has changed nothing but parameters that its plan fills wholly, in place."""
        alone = self._draft is None and self._part is None and not self._aliases.tensors
        return self.interrupted and alone and isinstance(self._target, PlannedReload) and self._target.only_copied

    def _opened(self) -> AnyReload:
        if self._target is None:
            raise CheckpointStateError("the served model was not made ready for new weights")
        return self._target

    def _made_up(self) -> Noise:
        if self._noise is None:
            self._noise = Noise(self._worker)
        return self._noise

    def _repairs(self) -> Repairs:
        return CpuRepairs() if compat.on_cpu(self._worker) else Repairs()

    def _open_by_loader(self, update: Update) -> None:
        """Of tensors that are not announced nothing can be planned; the draft model keeps what it has."""
        if update.reload == "plan":
            raise WeightsRejectedError("reload by plan was asked for, and the update does not say what it brings")
        self._plan, self._draft = None, None
        model, model_config = compat.target_model(self._worker), self._worker.model_config
        self._target = open_reload(self._ladder, "loader", None, model, model_config, self._repairs())

    def _check_part(self, update: Update) -> None:
        """Some tensors only: the served model alone gets them, and nothing else of it is opened."""
        model, model_config = compat.target_model(self._worker), self._worker.model_config
        _refuse_draft(self._worker, update.tensors, self._planner)
        self._draft = None
        config = self._worker.vllm_config
        self._plan = plan = self._planner.plan(_PART, config, model_config, update.tensors, model)
        why = self._planner.obstacle(_PART)
        self._part = part = Part(plan, why, model, update.tensors, int(config.parallel_config.pipeline_parallel_size))
        if plan is not None:
            found = missing_parameters(plan, model, quantised=config.quant_config is not None, find=torn)
            if found:
                raise WeightsRejectedError(f"{_TORN}: {listed(found)}; bring all tensors of these layers, or none")
            if plan.too_large:
                raise WeightsRejectedError(f"{TOO_LARGE}: {listed(plan.too_large)}; is it of the served model?")
        self._aliases, self._ties = Aliases(plan, model), Ties(plan, model)
        self._target = open_reload(
            self._part_ladder,
            update.reload,
            plan,
            model,
            model_config,
            self._repairs(),
            part.others,
            obstacle=why,
            only=part.layers,
            compared=update.compared,
        )

    def _check_reloadable(self) -> None:
        if not self.version:
            graphs = compat.captures_graphs(self._worker)
            found = formats.unreloadable(compat.target_model(self._worker), graphs=graphs)
            _refuse(_STALE, found, hint="old or freed memory would be read")

    def _check_served(self, tensors: Mapping[str, TensorSpec]) -> None:
        config, served = self._worker.vllm_config, compat.target_model(self._worker)
        self._plan = plan = self._planner.plan(_SERVED, config, self._worker.model_config, tensors, served)
        if plan is None:
            return
        if plan is not self._fitting and plan.is_complete:
            quantised = config.quant_config is not None
            idle = compat.idle_heads(served)
            found = [
                missing_parameters(plan, served, quantised=quantised, shared=idle, find=find)
                for find in (missing, torn)
            ]
            _refuse(NOT_FILLED, *found, **_passed_over(plan, found[0]))
            _refuse(NOT_FILLED, _left_as_noise(plan, self._made_up().left()), hint=_NOISE)
            _refuse(TOO_LARGE, plan.too_large)
            self._fitting = plan
        if not compat.reloads_attention_scales():
            _refuse(_SCALES, _attention_scales(plan, served), hint="leave them out, or use vLLM 0.20 or newer")

    def _figures(self, target: AnyReload, draft: DraftReload | None) -> UpdateFigures:
        ladder = self._ladder if self._part is None else self._part_ladder
        rung = ladder.rung
        by_loader = target.loader_bytes if rung.by_plan else self.nbytes
        return UpdateFigures(
            reload=rung.word,
            plan_bytes=self.nbytes - by_loader,
            read_bytes=target.read_bytes,
            loader_bytes=by_loader,
            loader_reason=ladder.reason,
            cloned_bytes=target.cloned_bytes + (0 if draft is None else draft.cloned_bytes),
            engine={"vllm": compat.version(), "draft_tensors": 0 if draft is None else draft.tensors},
        )


def _refuse_draft(worker: Worker, tensors: Mapping[str, TensorSpec], planner: Planner) -> None:
    """Refuses what the draft model would need as well: it shares the checkpoint, but not these layers."""
    draft = open_draft(worker, tensors, planner, LayersLadder(NAME), "loader")
    if draft is not None and (found := sorted(draft.needed)):
        raise WeightsRejectedError(
            f"{listed(found)}: for the draft model too, which takes whole checkpoints only: leave them out"
        )


def _left_as_noise(plan: LoadPlan, buffers: Sequence[str]) -> list[str]:
    written = plan.reload.recording.written
    return [f"{name} (nothing)" for name in buffers if name in plan.targets and not written.get(name)]


def _refuse_incomplete(names: Sequence[str]) -> None:
    _refuse(NOT_FILLED, names, [name for name in names if is_torn(name)])


def _refuse(problem: str, names: Sequence[str], halves: Sequence[str] = (), **hint: str) -> None:
    lenient = os.environ.get(LENIENT) == "1"
    refuse(problem, names, engine="vLLM", variable=LENIENT, lenient=lenient, halves=halves, **hint)


def _passed_over(plan: LoadPlan, missing: Sequence[str]) -> dict[str, str]:
    """A hint where the checkpoint has a tensor for a parameter, and vLLM's loader does not put it there."""
    names = [each.partition(" ")[0] for each in missing]
    found = [tensor for tensor in sorted(plan.ignored) for name in names if _belongs(tensor, name)]
    if not found:
        return {}
    return {"hint": f"vLLM's own loader does not put {found[0]!r} there; start the engine anew with this checkpoint"}


def _belongs(tensor: str, parameter: str) -> bool:
    """Whether they have the same last name, and the parameter lies in what the tensor lies in."""
    (layer, _, own), (inner, _, name) = tensor.rpartition("."), parameter.rpartition(".")
    return own == name and f"{inner}.".startswith(f"{layer}.")


def _attention_scales(plan: LoadPlan, served: torch.nn.Module) -> list[str]:
    modules = compat.modules_by_name(served)
    owners = {target: modules.get(target.rpartition(".")[0]) for target in plan.reload.recording.origins}
    return [target for target, owner in owners.items() if owner is not None and compat.is_attention(owner)]
