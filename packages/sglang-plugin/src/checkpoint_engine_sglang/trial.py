"""Finds out where a model's loader would put each tensor, before any of them comes.

SGLang's own loader is run over the served model while that has no data, with tensors that have none. In milliseconds
it shows which tensors the model does not take, which of its parameters would stay without weights, which tensors the
loader joins and therefore needs in one call, and the copies that all of it comes down to.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.engine.loading import rejection
from checkpoint_engine.reload.plan import Recording, ReloadPlan, make_plan
from checkpoint_engine.reload.recorder import LoaderError, record
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.layouts import without_data
from checkpoint_engine_sglang.rebuilding import attributes, tensors_in

logger = logging.getLogger(__name__)

LOADER = "SGLang's loader"
_NEVER_LOADED = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.(k|v|kv)_scale)$")
"""Tensors that old checkpoints have and no model takes; and scales of an FP8 cache, which SGLang may run without."""


@dataclass(frozen=True)
class Trial:
    """What the loader would do."""

    plan: ReloadPlan
    targets: Mapping[str, torch.Tensor]
    """Parameters and buffers by name, without data, in the layout that the loader fills."""
    derived: tuple[str, ...] = ()
    """What the loader itself makes of the weights besides, where most models do so once all are loaded."""

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

    def missing(self, runner: Runner, lent: frozenset[int], *, quantised: bool) -> list[str]:
        """Parameters that would get nothing, or only a part, with what they would get.

        Those whose storage is in `lent` belong to another model.
        """
        written, origins = self.recording.written, self.recording.origins
        here = dict(runner.model.named_parameters())
        return [
            f"{name} (nothing)"
            if not written.get(name)
            else f"{name} ({written[name]} of {target.numel()} elements, from {', '.join(sorted(origins[name]))})"
            for name, target in self.targets.items()
            if isinstance(target, torch.nn.Parameter)
            and written.get(name, 0) < target.numel()
            and not (name in here and here[name].untyped_storage().data_ptr() in lent)
            and not (quantised and _comes_without(runner.model, name))
        ]

    def too_large(self, tensors: Mapping[str, TensorSpec], tensor_parallel_size: int) -> list[str]:
        """Tensors of which all tensor-parallel ranks together take only a part."""
        return [
            f"{name} (shape {list(tensors[name].shape)}, {taken} elements taken)"
            for name, taken in self.recording.taken.items()
            if taken * tensor_parallel_size < math.prod(tensors[name].shape)
        ]


def digest(tensors: Mapping[str, TensorSpec]) -> str:
    """Stands for the names, shapes and dtypes of tensors."""
    found = hashlib.sha256()
    for name, spec in sorted(tensors.items()):
        found.update(f"{name}\0{spec.dtype}\0{spec.shape}\n".encode())
    return found.hexdigest()


def try_out(runner: Runner, tensors: Mapping[str, TensorSpec]) -> Trial | None:
    """Runs the loader of a model without data; None where it cannot be told what each tensor is for.

    Raises:
        WeightsRejectedError: the loader does not take a tensor, or not in this shape.
    """
    with without_data(runner.model) as targets:
        before, held = _places(runner.model), _attributes(runner.model)
        try:
            recording = record(cast("Any", runner.model).load_weights, targets, tensors)
        except LoaderError as failure:
            raise rejection(LOADER, failure.name, tensors.get(failure.name), failure.error) from failure.error
        after = _places(runner.model)
        derived = [name for name, value in _attributes(runner.model).items() if held.get(name) is not value]
    replaced = [name for name, place in before.items() if after.get(name) != place]
    if replaced:
        logger.warning("cannot check weights beforehand: the loader replaces %s", ", ".join(replaced[:3]))
        return None
    _refuse_stretched(recording, tensors)
    trial = Trial(make_plan(recording, targets), targets, tuple(derived))
    if not trial.plan.is_traced():
        name, reason = next(iter(recording.unreadable.items()))
        logger.warning("cannot check weights beforehand: %s of the %s model: %s", name, runner.role, reason)
        return None
    return trial


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


def _places(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """A tensor without data has no other place than its storage."""
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


def _comes_without(model: torch.nn.Module, parameter: str) -> bool:
    """Whether a quantised layer has a parameter for which its checkpoint need not have anything."""
    layer, _, own = parameter.rpartition(".")
    return "weight" not in own or ("scale" in own and compat.finds_scales(model.get_submodule(layer)))


def _is_superfluous(name: str, runner: Runner) -> bool:
    """Whether checkpoints may bring a tensor that this model has no use for."""
    config = runner.hf_config
    if _NEVER_LOADED.search(name):
        return True
    if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
        return True
    layers = getattr(config, "num_hidden_layers", None)
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    # Layers behind the last one, and those under `mtp.`, predict further tokens; only a draft model has them.
    return name.startswith("mtp.") or (layers is not None and layer is not None and int(layer.group(1)) >= int(layers))
