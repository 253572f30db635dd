"""Finds out where a model's loader puts each tensor of a checkpoint, before any of them comes.

vLLM's own loader is run over a second model without data, with tensors without data: in milliseconds it shows which
tensors the model does not know, which it ignores, and which of its parameters would stay without weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch

from checkpoint_engine.sdk import CheckpointEngineError, TensorSpec
from checkpoint_engine.sdk.fit import Coverage, fingerprint, missing, too_large
from checkpoint_engine.sdk.plans import (
    LoaderError,
    Recording,
    ReloadPlan,
    changed_switches,
    make_plan,
    record,
    rejection,
    switches_of,
)
from checkpoint_engine_vllm import compat, shadow
from checkpoint_engine_vllm.protocols import ModelConfig, VllmConfig
from checkpoint_engine_vllm.reaching import reach_weights

__all__ = ["Find", "LoadPlan", "Planner", "missing_parameters"]

logger = logging.getLogger(__name__)


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

    direct: frozenset[str] = frozenset()
    """Targets that vLLM's loader writes to by itself, and not through their own loaders, which a reload watches."""

    ignored: frozenset[str] = frozenset()
    """Tensors that vLLM's loader passes over."""

    at_once: bool = False
    """Whether vLLM's loader does otherwise when it is called for a part, and so must get all tensors in one call."""

    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Buffers and plain tensors of the model -> the target that they show, in another shape."""

    beside: frozenset[str] = frozenset()
    """Tensors that are neither parameters nor buffers, and that vLLM's loader fills or makes."""

    too_large: tuple[str, ...] = ()
    """Tensors of which vLLM's loaders would cut off silently what no worker has room for."""

    noted: Mapping[str, object] = field(default_factory=dict[str, object])
    """Flags and numbers that vLLM's loader sets in layers; see `switches_of`."""

    @property
    def is_complete(self) -> bool:
        """Whether it is known where every tensor goes to."""
        return not self.gap

    @cached_property
    def gap(self) -> str:
        """Why that is not known of some tensor; empty if it is of all."""
        reload = self.reload
        if not reload.recording.complete:
            return f"its loader reads the values of more than {len(reload.loader_only) - 1} tensors"
        if not reload.is_traced():
            name, why = next(iter(reload.untraced().items()))
            return f"it is not known where {name!r} goes to: {why}"
        # A tensor whose loader gave up may be the one that fills what nothing else does.
        empty = [name for name, coverage in self.parameters.items() if not coverage.complete]
        if reload.loader_only and empty:
            return f"{min(reload.loader_only)!r} may be what fills {empty[0]!r}"
        return ""


@dataclass(frozen=True)
class _CachedPlan:
    key: str
    tensors: Mapping[str, TensorSpec]
    plan: LoadPlan | None
    obstacle: str
    """Why there is none."""


class Planner:
    """Makes plans, and caches the last one of each model: the next update mostly brings the same tensors."""

    def __init__(self) -> None:
        self._cache: dict[str, _CachedPlan] = {}

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
        cached = self._cache.get(model)
        if cached is not None and cached.tensors is tensors:  # mostly so, and then nothing is done for each of them
            return cached.plan
        key = fingerprint(tensors)
        if cached is None or cached.key != key:
            self._cache.pop(model, None)
            cached = _plan_anew(key, config, model_config, tensors, live)
        self._cache[model] = replace(cached, tensors=tensors)
        return cached.plan

    def obstacle(self, model: str) -> str:
        """Why the last plan of `model` cannot be used; empty if it can."""
        cached = self._cache[model]
        return cached.obstacle if cached.plan is None else cached.plan.gap


Find = Callable[[Mapping[str, Coverage], Callable[[str], bool]], list[str]]
"""`missing` or `torn` of the sdk's `fit`."""


def missing_parameters(
    plan: LoadPlan,
    model: torch.nn.Module,
    *,
    quantised: bool,
    shared: frozenset[torch.nn.Module] = frozenset(),
    find: Find = missing,
) -> list[str]:
    """Parameters that a checkpoint would leave without (some of) their weights, with what they would get.

    Modules in `shared` are another model's.
    """
    covered = {name for name, coverage in plan.parameters.items() if coverage.complete}
    addresses: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            addresses.setdefault(parameter.untyped_storage().data_ptr(), set()).add(name)
    # vLLM may have tied parameters after it loaded its first checkpoint.
    tied = {name for names in addresses.values() if names & covered for name in names}

    def may_lack(name: str) -> bool:
        owner = _owner(model, name)
        if name in tied or owner in shared:
            return True
        return quantised and not plan.parameters[name].filled and _is_optional(owner, name)

    return find(plan.parameters, may_lack)


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return None


def _is_optional(owner: torch.nn.Module | None, parameter: str) -> bool:
    """Whether a quantised checkpoint may lack it: vLLM has a default for it, also when it loads anew."""
    if owner is not None and compat.is_attention(owner):
        return True  # scales of a cache
    return parameter.endswith(("shape", "g_idx", "zero_point", "sort_indices"))


def _plan_anew(
    key: str,
    config: VllmConfig,
    model_config: ModelConfig,
    tensors: Mapping[str, TensorSpec],
    live: torch.nn.Module,
) -> _CachedPlan:
    try:
        model = shadow.build_without_data(config, model_config)
        shadow.share_tables(live, model)
    except CheckpointEngineError:
        raise
    except Exception as error:  # noqa: BLE001 - any model may fail in any way without data; the checks at the end remain
        logger.warning("cannot check weights beforehand, the model cannot be built without data: %r", error)
        return _CachedPlan(key, tensors, None, f"it cannot be built without data ({type(error).__name__}: {error})")
    return _CachedPlan(key, tensors, _make_plan(key, config, model, tensors), "")


def _make_plan(key: str, config: VllmConfig, model: torch.nn.Module, tensors: Mapping[str, TensorSpec]) -> LoadPlan:
    computed = frozenset(_computed(model))
    called = compat.watch_loaders(model)
    before, beside, switches = _targets(model), _beside(model), switches_of(model)
    recording = _record(model, {**before, **beside}, tensors)
    noted = changed_switches(switches, switches_of(model))
    _keep_last_shapes(recording)
    for name, reason in recording.unreadable.items():
        logger.info("tensor %r is loaded by vLLM: %s", name, reason)
    targets = _targets(model)
    plan = make_plan(recording, {**targets, **beside})
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
        frozenset(name for name in recording.origins if name in before and id(before[name]) not in called),
        frozenset(tensors.keys() - recording.taken.keys() - recording.unreadable.keys()),
        _needs_all_at_once(model, targets, tensors, recording),
        dict(_aliases(model, targets)),
        frozenset(beside.keys() & recording.origins.keys() | _beside(model).keys() - beside.keys()),
        tuple(_too_large(model, plan, tensors, int(config.parallel_config.tensor_parallel_size))),
        noted,
    )


def _record(
    model: torch.nn.Module, targets: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorSpec]
) -> Recording:
    try:
        with compat.bucketed_load():
            return record(cast("Any", model).load_weights, targets, tensors)
    except LoaderError as failure:
        raise rejection("vLLM's loader", failure.name, tensors.get(failure.name), failure.error) from failure.error


def _too_large(
    model: torch.nn.Module, plan: ReloadPlan, tensors: Mapping[str, TensorSpec], tensor_parallel_size: int
) -> list[str]:
    """Stages of a pipeline and replicas share nothing: what they hold is another layer, or the same part again."""
    modules = compat.modules_by_name(model)

    def shared_by(tensor: str, parameter: str) -> int:
        layer = modules.get(parameter.rpartition(".")[0], model)
        return compat.workers_sharing(layer, tensor, tensor_parallel_size)

    # What is computed from a tensor says nothing of how much of it there is room for.
    flawed, origins = plan.recording.flaws, plan.recording.origins
    computed = {source for target in flawed for source in origins.get(target, ())}
    plain = {name: spec for name, spec in tensors.items() if name not in computed}
    shares = {pair: elements for pair, elements in plan.recording.shares.items() if pair[0] in plain}
    return too_large(plain, shares, shared_by)


def _computed(model: torch.nn.Module) -> Iterator[str]:
    """Has a model loaded without quantising; yields the parameters that were for what quantising makes."""
    for prefix, layer in compat.modules_by_name(model).items():
        own = dict(layer.named_parameters(recurse=False))
        quantised = [name for name, parameter in own.items() if compat.load_without_processing(parameter)]
        if quantised:
            yield from (f"{prefix}.{name}" for name in own if name.endswith("_scale"))


def _needs_all_at_once(
    model: torch.nn.Module, targets: Mapping[str, torch.Tensor], tensors: Mapping[str, TensorSpec], whole: Recording
) -> bool:
    """Whether a loader ties, computes, guesses or checks something in each call, by what else it was given in it."""
    shares = dict[str, dict[tuple[str, str], int]]()
    for (name, target), elements in whole.shares.items():
        shares.setdefault(name, {})[name, target] = elements
    try:
        for names in ((), *_samples(tensors, whole)):
            with compat.bucketed_load():
                part = record(cast("Any", model).load_weights, targets, {name: tensors[name] for name in names})
            expected = {pair: elements for name in names for pair, elements in shares.get(name, {}).items()}
            if part.shares != expected or (part.written and not names):
                return True
    except LoaderError:
        return True
    return False


def _samples(tensors: Mapping[str, TensorSpec], whole: Recording) -> Iterator[list[str]]:
    """One tensor of each kind, with those that it is put together with."""
    kinds = {re.sub(r"\d+", "0", name): name for name in tensors}
    for name in kinds.values():
        yield sorted(whole.joined.get(name, (name,)))


def _aliases(model: torch.nn.Module, targets: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Tensors of a model that lie in the memory of one of `targets`, and are no parameters."""
    known = {_storage(tensor): name for name, tensor in targets.items()}
    for prefix, layer in compat.modules_by_name(model).items():
        for own, tensor in {**dict(layer.named_buffers(recurse=False)), **vars(layer)}.items():
            if isinstance(tensor, torch.Tensor) and not shadow.is_lazy(tensor) and tensor.is_meta:
                name, target = f"{prefix}.{own}" if prefix else own, known.get(_storage(tensor), "")
                if target and name != target and not isinstance(tensor, torch.nn.Parameter):
                    yield name, target


def _targets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that have a shape; of those that share memory, the first."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not shadow.is_lazy(tensor) and tensor.is_meta:
            found.setdefault(_storage(tensor), (name, tensor))
    return dict(found.values())


def _beside(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors with memory of their own that are neither parameters nor buffers."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    known: set[int] = set()
    for each in reach_weights(model):
        if shadow.is_lazy(each.tensor) or not each.tensor.is_meta:
            continue
        if each.registered:
            known.add(_storage(each.tensor))
        else:
            found.setdefault(_storage(each.tensor), (each.path, each.tensor))
    return dict(pair for storage, pair in found.items() if storage not in known)


def _coverage(name: str, parameter: torch.Tensor, plan: ReloadPlan) -> Coverage:
    elements = int(getattr(parameter, "weight_loader_numel", parameter.numel()))
    sources = frozenset(plan.recording.origins.get(name, ()))
    # Whoever reads values before it writes has written nothing here.
    unknown = any(source in plan.loader_only for source in sources)
    return Coverage(elements, elements if unknown else plan.recording.written.get(name, 0), sources)


def _storage(tensor: torch.Tensor) -> int:
    return cast("Any", tensor.untyped_storage())._cdata  # noqa: SLF001 - a meta tensor has no other identity


def _keep_last_shapes(recording: Recording) -> None:
    """Packed weights come with their shape, and a fused layer gets one of each part: vLLM keeps one, and needs none."""
    last = {
        (piece.target, piece.target_region): piece
        for piece in recording.pieces
        if piece.target.endswith("weight_shape")
    }
    recording.pieces = {
        piece: None for piece in recording.pieces if last.get((piece.target, piece.target_region), piece) is piece
    }
