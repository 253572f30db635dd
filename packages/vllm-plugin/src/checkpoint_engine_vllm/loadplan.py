"""Finds out where a model's loader puts each tensor of a checkpoint, before any of them comes.

vLLM's own loader is run over a second model without data, with tensors without data: in milliseconds it shows which
tensors the model does not know, which it ignores, and which of its parameters would stay without weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.engine.loading import rejection
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.reload.plan import Recording, ReloadPlan, make_plan
from checkpoint_engine.reload.recorder import LoaderError, record
from checkpoint_engine_vllm import compat, shadow
from checkpoint_engine_vllm.protocols import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coverage:
    """How much of a parameter a checkpoint fills."""

    elements: int
    filled: int
    tensors: frozenset[str]

    @property
    def complete(self) -> bool:
        """Whether every element is filled."""
        return self.filled >= self.elements


@dataclass(frozen=True)
class LoadPlan:
    """What the loader would do."""

    key: str
    """Stands for the names, shapes and dtypes of the tensors."""

    reload: ReloadPlan
    """The copies that it would do."""

    targets: Mapping[str, torch.Tensor]
    """Parameters and buffers of the model without data, by the names that the model has for them."""

    parameters: Mapping[str, Coverage]
    """Those of them that are parameters, and filled by tensors."""

    computed: frozenset[str] = frozenset()
    """Parameters that vLLM computes: scales of what it quantises while it loads."""

    @property
    def taken(self) -> Mapping[str, int]:
        """Name of a tensor -> how many of its elements this worker takes."""
        return self.reload.recording.taken

    @property
    def is_complete(self) -> bool:
        """Whether it is known where every tensor goes to."""
        if not self.reload.is_traced():
            return False
        # A tensor whose loader gave up may be the one that fills what nothing else does.
        return not self.reload.loader_only or all(coverage.complete for coverage in self.parameters.values())


@dataclass(frozen=True)
class _Known:
    key: str
    tensors: Mapping[str, TensorSpec]
    plan: LoadPlan | None


class Planner:
    """Makes plans, and keeps the last one of each model: the next update mostly brings the same tensors."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def plan(
        self,
        model: str,
        config: VllmConfig,
        model_config: ModelConfig,
        tensors: Mapping[str, TensorSpec],
        live: torch.nn.Module,
    ) -> LoadPlan | None:
        """Runs the loader of `model` (any name for it, `live` being it) without data; None where that is not possible.

        Raises:
            WeightsRejectedError: the loader does not know a tensor, or not in this shape.
        """
        known = self._known.get(model)
        if known is not None and known.tensors is tensors:  # mostly so, and then nothing is done for each of them
            return known.plan
        key = _fingerprint(tensors)
        if known is None or known.key != key:
            self._known.pop(model, None)
            known = _Known(key, tensors, _make_plan(key, config, model_config, tensors, live))
        self._known[model] = replace(known, tensors=tensors)
        return known.plan


def _fingerprint(tensors: Mapping[str, TensorSpec]) -> str:
    digest = hashlib.sha256()
    for name, spec in sorted(tensors.items()):
        digest.update(f"{name}\0{spec.dtype}\0{spec.shape}\n".encode())
    return digest.hexdigest()


def missing_parameters(
    plan: LoadPlan, model: torch.nn.Module, *, quantised: bool, lent: frozenset[torch.nn.Module] = frozenset()
) -> list[str]:
    """Parameters that a checkpoint would leave without (some of) their weights, with what they would get.

    Modules in `lent` are another model's.
    """
    covered = {name for name, coverage in plan.parameters.items() if coverage.complete}
    addresses: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            addresses.setdefault(parameter.untyped_storage().data_ptr(), set()).add(name)
    # vLLM may have tied parameters after it loaded its first checkpoint.
    tied = {name for names in addresses.values() if names & covered for name in names}
    return [
        f"{name} (nothing)"
        if not coverage.filled
        else f"{name} ({coverage.filled} of {coverage.elements} elements, from {', '.join(sorted(coverage.tensors))})"
        for name, coverage in plan.parameters.items()
        if not coverage.complete
        and name not in tied
        and not (quantised and _is_optional(name))
        and _owner(model, name) not in lent
    ]


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return None


def _is_optional(parameter: str) -> bool:
    """Whether a quantised checkpoint may lack it: vLLM has a default for it."""
    own_name = parameter.rpartition(".")[2]
    return "weight" not in own_name or own_name.endswith(("shape", "g_idx", "zero_point", "sort_indices"))


def _make_plan(
    key: str,
    config: VllmConfig,
    model_config: ModelConfig,
    tensors: Mapping[str, TensorSpec],
    live: torch.nn.Module,
) -> LoadPlan | None:
    try:
        model = shadow.build_without_data(config, model_config)
        shadow.lend_tables(live, model)
    except CheckpointEngineError:
        raise
    except Exception as error:  # noqa: BLE001 - any model may fail in any way without data; the checks at the end remain
        logger.warning("cannot check weights beforehand, the model cannot be built without data: %r", error)
        return None
    computed = frozenset(_computed(model))
    try:
        with compat.bucketed_load():
            recording = record(cast("Any", model).load_weights, _targets(model), tensors)
    except LoaderError as failure:
        raise rejection("vLLM's loader", failure.name, tensors.get(failure.name), failure.error) from failure.error
    _keep_last_shapes(recording)
    for name, reason in recording.unreadable.items():
        logger.info("tensor %r is loaded by vLLM: %s", name, reason)
    targets = _targets(model)
    plan = make_plan(recording, targets)
    return LoadPlan(
        key,
        plan,
        targets,
        {
            name: _coverage(name, parameter, plan)
            for name, parameter in model.named_parameters()
            if name in targets and name not in computed
        },
        computed,
    )


def _computed(model: torch.nn.Module) -> Iterator[str]:
    """Has a model loaded without quantising; yields the parameters that were for what quantising makes."""
    for prefix, layer in compat.modules_by_name(model).items():
        own = dict(layer.named_parameters(recurse=False))
        quantised = [name for name, parameter in own.items() if compat.load_without_processing(parameter)]
        if quantised:
            yield from (f"{prefix}.{name}" for name in own if name.endswith("_scale"))


def _targets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that have a shape; of those that share memory, the first."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_lazy(tensor) and tensor.is_meta:
            found.setdefault(_storage(tensor), (name, tensor))
    return dict(found.values())


def _coverage(name: str, parameter: torch.Tensor, plan: ReloadPlan) -> Coverage:
    elements = int(getattr(parameter, "weight_loader_numel", parameter.numel()))
    sources = frozenset(plan.recording.origins.get(name, ()))
    # Whoever reads values before it writes has written nothing here.
    unknown = any(source in plan.loader_only for source in sources)
    return Coverage(elements, elements if unknown else plan.recording.written.get(name, 0), sources)


def _storage(tensor: torch.Tensor) -> int:
    return cast("Any", tensor.untyped_storage())._cdata  # noqa: SLF001 - a meta tensor has no other identity


def _is_lazy(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, (UninitializedParameter, UninitializedBuffer))


def _keep_last_shapes(recording: Recording) -> None:
    """Packed weights come with their shape, and a fused layer gets one of each part: vLLM keeps one, and needs none."""
    last = {(piece.target, piece.place): piece for piece in recording.pieces if piece.target.endswith("weight_shape")}
    recording.pieces = {
        piece: None for piece in recording.pieces if last.get((piece.target, piece.place), piece) is piece
    }
