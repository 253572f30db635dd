"""Finds out where a model's loader would put each tensor, before any of them comes.

SGLang's own loader is run over the served model while that has no data, with tensors that have none. In milliseconds
it shows which tensors the model does not take, which of its parameters would stay without weights, which tensors the
loader joins and therefore needs in one call, and the copies that all of it comes down to.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from checkpoint_engine.sdk import TensorSpec, fit
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
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.constants import find_constants, names_at_start
from checkpoint_engine_sglang.layouts import layouts_of, without_data
from checkpoint_engine_sglang.rebuilding import attributes, tensors_in
from checkpoint_engine_sglang.sharding import is_checked_by_loader, workers_sharing

__all__ = ["LOADER", "DryRun", "run_dry"]

logger = logging.getLogger(__name__)

LOADER = "SGLang's loader"
_NEVER_LOADED = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.(k|v|kv)_scale)$")
"""Tensors that old checkpoints have and no model takes; and scales of an FP8 cache, which SGLang may run without."""


@dataclass(frozen=True)
class DryRun:
    """What the loader would do."""

    plan: ReloadPlan
    targets: Mapping[str, torch.Tensor]
    """Parameters and buffers by name, without data, in the layout that the loader fills."""
    derived: tuple[str, ...] = ()
    """What the loader itself makes of the weights besides, where most models do so once all are loaded."""
    obstacle: str = ""
    """Why it cannot be told where each tensor goes; then nothing is known of any."""
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """Parameters and buffers that checkpoints of this model do not have, and what they held at first."""
    lacking: tuple[str, ...] = ()
    """Buffers that the loader would take, and this checkpoint does not have."""
    names: frozenset[str] = frozenset()
    """The checkpoint's tensors."""
    whole: str = ""
    """Why the loader must be given all tensors in one call, as at a start; empty if it takes them in parts."""
    switches: Collection[str] = ()
    """What the loader would note in layers beside their weights, and has not yet; see `switches_of`."""

    @property
    def recording(self) -> Recording:
        """All that was seen."""
        return self.plan.recording

    @property
    def placed(self) -> set[str]:
        """Tensors that something in the model would come from."""
        return set[str]().union(*self.recording.origins.values())

    def unplaced(self, tensors: Mapping[str, TensorSpec], runner: Runner) -> set[str]:
        """Tensors that would go nowhere and that the model is not known to do without."""
        placed = self.placed
        return {name for name in tensors if name not in placed and not _is_superfluous(name, runner)}

    def missing(self, runner: Runner, shared: Collection[int]) -> tuple[list[str], list[str]]:
        """Parameters that would get nothing, or only a part, with what they would get; and those of torn layers.

        Those whose storage is in `shared` are filled by another model.
        """
        written, origins = self.recording.written, self.recording.origins
        here = dict(runner.model.named_parameters())
        parameters = {
            name: fit.Coverage(target.numel(), written.get(name, 0), frozenset(origins.get(name, ())))
            for name, target in self.targets.items()
            if isinstance(target, torch.nn.Parameter)
        }

        starts = names_at_start(runner.path)
        left_at_start = _kept_values(runner.model) if starts and starts <= self.names else frozenset[str]()

        def may_lack(name: str) -> bool:
            if name in here and here[name].untyped_storage().data_ptr() in shared:
                return True
            return name in self.constants or _comes_without(runner.model, name) or name in left_at_start

        lacking = [f"{name} (nothing)" for name in self.lacking]
        return [*fit.missing(parameters, may_lack), *lacking], fit.torn(parameters, may_lack)

    def too_large(self, tensors: Mapping[str, TensorSpec], runner: Runner, tensor_parallel_size: int) -> list[str]:
        """Tensors of which all workers together take only a part."""
        layers = {target: _layer_of(runner.model, target) for target in self.recording.origins}
        taken = {
            (name, target): elements
            for (name, target), elements in self.recording.shares.items()
            if not is_checked_by_loader(layers[target])
        }

        def shared_by(name: str, target: str) -> int:
            return workers_sharing(layers[target], name, tensor_parallel_size)

        return fit.too_large(tensors, taken, shared_by)


def run_dry(runner: Runner, tensors: Mapping[str, TensorSpec]) -> DryRun:
    """Runs the loader of a model without data.

    Raises:
        WeightsRejectedError: the loader does not take a tensor, or not in this shape.
    """
    with without_data(runner.model) as targets:
        before, held, noted = _identities(runner.model), _attributes(runner.model), switches_of(runner.model)
        try:
            recording = record(compat.loader_of(runner.model), targets, tensors)
        except LoaderError as failure:
            raise rejection(LOADER, failure.name, tensors.get(failure.name), failure.error) from failure.error
        after = _identities(runner.model)
        switches = changed_switches(noted, switches_of(runner.model)).keys()
        derived = [name for name, value in _attributes(runner.model).items() if held.get(name) is not value]
    replaced = [name for name, identity in before.items() if after.get(name) != identity]
    if replaced:
        return _in_vain(runner, f"it replaces {', '.join(replaced[:3])}")
    _refuse_stretched(recording, tensors)
    plan = make_plan(recording, targets)
    if not plan.is_traced():
        name, reason = next(iter(recording.unreadable.items()))
        return _in_vain(runner, f"it needs data: {name}: {reason}")
    constants, lacking = find_constants(runner, recording, tensors)
    whole = _why_whole(runner, tensors, recording)
    return DryRun(
        plan,
        targets,
        tuple(derived),
        constants=constants,
        lacking=tuple(lacking),
        names=frozenset(tensors),
        whole=whole,
        switches=switches,
    )


def _why_whole(runner: Runner, tensors: Mapping[str, TensorSpec], whole: Recording) -> str:
    """What a loader does otherwise when it is given the same tensors in several calls."""
    calls = _calls(tensors, whole.joined)
    number = {name: index for index, names in enumerate(calls) for name in names}
    load = compat.loader_of(runner.model)

    def in_parts(given: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, part in itertools.groupby(given, lambda pair: number[pair[0]]):
            load(part)

    with without_data(runner.model) as targets:
        try:
            parts = record(in_parts, targets, {name: tensors[name] for name in number})
        except LoaderError as failure:
            return f"it does not take them in parts: {type(failure.error).__name__}: {str(failure.error)[:200]}"
    one, other = _by_target(whole), _by_target(parts)
    differing = sorted(target for target in one.keys() | other.keys() if one.get(target) != other.get(target))
    return f"in parts, it would fill {', '.join(differing[:3])} otherwise" if differing else ""


def _calls(tensors: Mapping[str, TensorSpec], joined: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Tensors in parts that keep apart those of different kinds, and layers, but not what belongs together."""
    kinds: dict[str, list[str]] = {}
    for name in tensors:
        kinds.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    halves = (part for names in kinds.values() for part in (names[: len(names) // 2], names[len(names) // 2 :]))
    calls, done = list[list[str]](), set[str]()
    for half in halves:
        wanted = dict.fromkeys(other for name in half for other in sorted(joined.get(name, (name,))))
        call = [name for name in wanted if name not in done]
        done.update(call)
        calls += [call] if call else []
    return calls


def _by_target(recording: Recording) -> Mapping[str, set[object]]:
    """All that is known of what goes into each target, whatever the order."""
    found: dict[str, set[object]] = {target: set(names) for target, names in recording.origins.items()}
    for piece in recording.pieces:
        found[piece.target].add(piece)
    for fill in recording.fills:
        found[fill.target].add((fill.target_region, fill.value))
    return found


def _in_vain(runner: Runner, reason: str) -> DryRun:
    obstacle = f"the loader of the {runner.role} model does not tell where tensors go ({reason})"
    logger.warning("cannot check weights beforehand: %s", obstacle)
    return DryRun(make_plan(Recording(), {}), {}, obstacle=obstacle)


def _refuse_stretched(recording: Recording, tensors: Mapping[str, TensorSpec]) -> None:
    """Torch repeats what is too small until it fits."""
    for piece in recording.pieces:
        spec = tensors[piece.source]
        stretched = any(
            size > 1 and not step for size, step in zip(piece.region.shape, piece.region.stride, strict=True)
        )
        if stretched and math.prod(spec.shape) > 1:
            shape = list(piece.region.shape)
            raise rejection(LOADER, piece.source, spec, ValueError(f"it would have to fit into shape {shape}"))


def _identities(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """A tensor without data has no address; its storage is still its own."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(tensor), cast("Any", tensor.untyped_storage())._cdata) for name, tensor in named}  # noqa: SLF001


def _attributes(model: torch.nn.Module) -> dict[str, object]:
    """What modules hold in tensors besides their parameters and buffers, and lists of those."""
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return {
        f"{name}.{own}".lstrip("."): value
        for name, module in compat.named_modules(model)
        for own, value in attributes(module).items()
        if any(id(tensor) not in registered for tensor in tensors_in(value))
    }


def _layer_of(model: torch.nn.Module, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _comes_without(model: torch.nn.Module, parameter: str) -> bool:
    """Whether a quantised layer has a parameter for which its checkpoint need not have anything.

    Such as scales of activations: what the quantisation adds to a layer, and has a value of its own from the start.
    """
    layer, _, own = parameter.rpartition(".")
    module = model.get_submodule(layer)
    method = compat.processing_of(module)
    if method is None or compat.is_unquantised(method):
        return False
    if "weight" in own:
        return "scale" in own and compat.finds_scales(module)
    layout = layouts_of(model).get(layer)
    slot = None if layout is None else layout.parameters.get(own)
    if slot is None or "bias" in own:
        return False
    return slot.initial is not None or "weight_loader" not in slot.attributes  # processing alone fills it


def _kept_values(model: torch.nn.Module) -> frozenset[str]:
    """Parameters of quantised layers that are made with a value of their own, which padding keeps."""
    return frozenset(
        f"{layer}.{own}".lstrip(".")
        for layer, layout in layouts_of(model).items()
        if not compat.is_unquantised(compat.processing_of(model.get_submodule(layer)))
        for own, slot in layout.parameters.items()
        if slot is not None and slot.initial is not None
    )


def _is_superfluous(name: str, runner: Runner) -> bool:
    """Whether checkpoints may bring a tensor that this model has no use for."""
    config = runner.hf_config
    if _NEVER_LOADED.search(name) or name in names_at_start(runner.path):
        return True  # what the checkpoint of the start has and went nowhere either is for nothing
    if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
        return True
    layers = getattr(config, "num_hidden_layers", None)
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    # Layers behind the last one, and those under `mtp.`, predict further tokens; only a draft model has them.
    return name.startswith("mtp.") or (layers is not None and layer is not None and int(layer.group(1)) >= int(layers))
