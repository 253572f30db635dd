"""Finds out where a model's loader puts each tensor of a checkpoint, before any of them comes.

vLLM's own loader is run over a second model without data, with tensors without data: in milliseconds it shows which
tensors the model does not know, which it ignores, and which of its parameters would stay without weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import CheckpointEngineError, WeightsRejectedError
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)

_LONGEST_REASON = 300
"""Characters; vLLM likes to list every parameter that it has."""


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

    parameters: Mapping[str, Coverage]
    """By the names that the model has for its parameters."""

    destinations: Mapping[str, frozenset[str]]
    """Name of a tensor -> names of the parameters it goes to; a tensor that is ignored goes nowhere."""

    taken: Mapping[str, int]
    """Name of a tensor -> how many of its elements this worker takes."""


class Watched:
    """Hands tensors to a loader and remembers which one it took last."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._tensors = tensors
        self.last = "(none)"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self.last = name
            yield name, tensor


class Planner:
    """Makes plans, and keeps the last one of each model: the next update mostly brings the same tensors."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, LoadPlan | None]] = {}

    def plan(
        self, model: str, config: VllmConfig, model_config: ModelConfig, tensors: Mapping[str, TensorSpec]
    ) -> LoadPlan | None:
        """Runs the loader of `model` (any name for it) without data; None where that is not possible.

        Raises:
            WeightsRejectedError: the loader does not know a tensor, or not in this shape.
        """
        digest = hashlib.sha256()
        for name, spec in sorted(tensors.items()):
            digest.update(f"{name}\0{spec.dtype}\0{spec.shape}\n".encode())
        key = digest.hexdigest()
        if model not in self._known or self._known[model][0] != key:
            self._known.pop(model, None)
            self._known[model] = (key, _make_plan(config, model_config, tensors))
        return self._known[model][1]


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


def _make_plan(config: VllmConfig, model_config: ModelConfig, tensors: Mapping[str, TensorSpec]) -> LoadPlan | None:
    try:
        model = compat.build_without_data(config, model_config)
    except CheckpointEngineError:
        raise
    except Exception as error:  # noqa: BLE001 - any model may fail in any way without data; the checks at the end remain
        logger.warning("cannot check weights beforehand, the model cannot be built without data: %r", error)
        return None
    if any(_is_quantised_while_loading(parameter) for parameter in model.parameters()):
        logger.warning("cannot check weights beforehand: this model is quantised while it loads")
        return None
    dataless = [(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for name, spec in tensors.items()]
    recorder, watched = _Recorder(model, dataless), Watched(dataless)
    try:
        with torch.no_grad(), torch.device("meta"), compat.bucketed_load(), recorder:
            cast("Any", model).load_weights(iter(watched))
    except Exception as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            logger.warning("cannot check weights beforehand, the loader reads values (at %r): %r", watched.last, error)
            return None
        raise rejection(watched.last, tensors.get(watched.last), error) from error
    return recorder.plan(model)


def rejection(name: str, spec: TensorSpec | None, error: Exception) -> WeightsRejectedError:
    """The error for a tensor at which vLLM's loader raised."""
    shape = "" if spec is None else f" ({str(spec.dtype).removeprefix('torch.')}, shape {list(spec.shape)})"
    reason = str(error) or "no reason given"
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]} …"
    return WeightsRejectedError(
        f"vLLM's loader does not take tensor {name!r}{shape}: {type(error).__name__}: {reason}; "
        "is this checkpoint of the same architecture as the served model?"
    )


class _Recorder(TorchDispatchMode):
    """Follows tensors through views and copies into parameters."""

    def __init__(self, model: torch.nn.Module, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._parameters = {
            _storage(parameter): name for name, parameter in model.named_parameters() if not _is_lazy(parameter)
        }
        self._origin = {_storage(tensor): frozenset((name,)) for name, tensor in tensors}
        self._filled: dict[str, int] = {}
        self._sources: dict[str, set[str]] = {}
        self._taken: dict[str, int] = {}
        # A storage's address must not be used again while we tell storages apart by it.
        self._keep_alive: list[torch.Tensor] = [tensor for _, tensor in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own signature
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        origin = frozenset[str]().union(*(self._origin.get(_storage(tensor), ()) for tensor in inputs))
        if _writes_first_argument(func) and inputs:
            self._note_write(inputs[0], origin)
        elif origin:
            self._follow(result, origin)
        return result

    def plan(self, model: torch.nn.Module) -> LoadPlan:
        """What was seen."""
        parameters = {
            name: Coverage(
                elements=int(getattr(parameter, "weight_loader_numel", parameter.numel())),
                filled=self._filled.get(name, 0),
                tensors=frozenset(self._sources.get(name, ())),
            )
            for name, parameter in model.named_parameters()
            if not _is_lazy(parameter)
        }
        destinations: dict[str, set[str]] = {}
        for parameter, names in self._sources.items():
            for name in names:
                destinations.setdefault(name, set()).add(parameter)
        return LoadPlan(parameters, {name: frozenset(found) for name, found in destinations.items()}, self._taken)

    def _note_write(self, target: torch.Tensor, origin: frozenset[str]) -> None:
        parameter = self._parameters.get(_storage(target))
        if parameter is None:
            self._origin[_storage(target)] = self._origin.get(_storage(target), frozenset()) | origin
            self._keep_alive.append(target)
            return
        self._filled[parameter] = self._filled.get(parameter, 0) + target.numel()
        self._sources.setdefault(parameter, set()).update(origin)
        for name in origin:
            self._taken[name] = self._taken.get(name, 0) + target.numel()

    def _follow(self, result: object, origin: frozenset[str]) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self._parameters:
                self._origin[_storage(tensor)] = self._origin.get(_storage(tensor), frozenset()) | origin
                self._keep_alive.append(tensor)


def _storage(tensor: torch.Tensor) -> int:
    return cast("Any", tensor.untyped_storage())._cdata  # noqa: SLF001 - a meta tensor has no other identity


def _is_lazy(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, (UninitializedParameter, UninitializedBuffer))


def _is_quantised_while_loading(parameter: torch.Tensor) -> bool:
    return getattr(getattr(parameter, "weight_loader", None), "__name__", "") == "online_process_loader"


def _writes_first_argument(operator: object) -> bool:
    arguments = cast("Any", operator)._schema.arguments  # noqa: SLF001 - the only way to ask
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
