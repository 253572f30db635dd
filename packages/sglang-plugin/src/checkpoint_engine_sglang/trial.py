"""Finds out where a model's loader would put each tensor, before any of them comes.

SGLang's own loader is run over the served model itself with tensors that have no data, and every write into the model
is noted instead of done. In milliseconds it shows which tensors the model does not take, which of its parameters would
stay without weights, and which tensors the loader joins and therefore needs in one call.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine_sglang.compat import Runner, named_modules

logger = logging.getLogger(__name__)

_LONGEST_REASON = 300
"""Characters."""
_aten: Any = torch.ops.aten
_NEVER_LOADED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tensors that old checkpoints have and no model takes."""
_DATALESS = ("meta", "set_data")
"""What torch says when a tensor without data is asked for it, or to take the place of one that has some."""


@dataclass
class Trial:
    """What the loader would do."""

    placed: set[str] = field(default_factory=set[str])
    """Tensors that something in the model would come from."""
    filled: dict[str, int] = field(default_factory=dict[str, int])
    """Parameter -> elements that would be written."""
    sources: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Parameter -> tensors that it would be made of."""
    taken: dict[str, int] = field(default_factory=dict[str, int])
    """Tensor -> elements of parameters that would come from it."""
    joined: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Tensor -> the tensors, itself among them, that must come in one call."""

    def unplaced(self, tensors: Mapping[str, TensorSpec], runner: Runner) -> set[str]:
        """Tensors that would go nowhere and that the model is not known to do without."""
        return {name for name in tensors if name not in self.placed and not _is_superfluous(name, runner)}

    def missing(self, runner: Runner, lent: frozenset[int], *, quantised: bool) -> list[str]:
        """Parameters that would get nothing, or only a part, with what they would get.

        Those whose storage is in `lent` belong to another model.
        """
        return [
            f"{name} (nothing)"
            if not self.filled.get(name)
            else f"{name} ({self.filled[name]} of {parameter.numel()} elements, "
            f"from {', '.join(sorted(self.sources.get(name, ())))})"
            for name, parameter in runner.model.named_parameters()
            if self.filled.get(name, 0) < parameter.numel()
            and _storage(parameter) not in lent
            and not (quantised and "weight" not in name.rpartition(".")[2])
        ]

    def too_large(self, tensors: Mapping[str, TensorSpec], tensor_parallel_size: int) -> list[str]:
        """Tensors of which all tensor-parallel ranks together take only a part."""
        return [
            f"{name} (shape {list(tensors[name].shape)}, {taken} elements taken)"
            for name, taken in self.taken.items()
            if taken * tensor_parallel_size < math.prod(tensors[name].shape)
        ]


class Watched:
    """Hands tensors to a loader and remembers which one it took last."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._tensors = tensors
        self.last = "(none)"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self.last = name
            yield name, tensor


class Trials:
    """Makes trials, and keeps the last one of each model: the next update mostly brings the same tensors."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, Trial | None]] = {}

    def of(self, runner: Runner, tensors: Mapping[str, TensorSpec]) -> Trial | None:
        """Runs the loader of a model without data; None where it reads values, or is not made of copies.

        Raises:
            WeightsRejectedError: the loader does not take a tensor, or not in this shape.
        """
        digest = hashlib.sha256()
        for name, spec in sorted(tensors.items()):
            digest.update(f"{name}\0{spec.dtype}\0{spec.shape}\n".encode())
        key = digest.hexdigest()
        if runner.role not in self._known or self._known[runner.role][0] != key:
            self._known.pop(runner.role, None)
            self._known[runner.role] = (key, _try(runner, tensors))
        return self._known[runner.role][1]


def rejection(name: str, spec: TensorSpec | None, error: Exception) -> WeightsRejectedError:
    """The error for a tensor at which SGLang's loader raised."""
    shape = "" if spec is None else f" ({str(spec.dtype).removeprefix('torch.')}, shape {list(spec.shape)})"
    reason = str(error) or "no reason given"
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]} …"
    return WeightsRejectedError(
        f"SGLang's loader does not take tensor {name!r}{shape}: {type(error).__name__}: {reason}; "
        "is this checkpoint of the same architecture as the served model?"
    )


def _try(runner: Runner, tensors: Mapping[str, TensorSpec]) -> Trial | None:
    dataless = [(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for name, spec in tensors.items()]
    watched = Watched(dataless)
    recorder = _Recorder(runner.model, dataless, watched)
    with _kept_as_it_is(runner.model) as replaced:
        try:
            with torch.no_grad(), recorder:
                cast("Any", runner.model).load_weights(iter(watched))
        except WeightsRejectedError:
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError) or any(word in str(error) for word in _DATALESS):
                logger.warning(
                    "cannot check weights beforehand, the loader of the %s model needs data (at %r): %r",
                    runner.role,
                    watched.last,
                    error,
                )
                return None
            raise rejection(watched.last, tensors.get(watched.last), error) from error
    if replaced:
        logger.warning("cannot check weights beforehand: the loader replaces %s", ", ".join(replaced[:3]))
        return None
    return recorder.trial


@contextlib.contextmanager
def _kept_as_it_is(model: torch.nn.Module) -> Generator[list[str]]:
    """Puts back whatever a loader exchanges for tensors without data; yields their names, once it is left."""
    replaced: list[str] = []
    before = [
        (name, module, kind, key, tensor, tensor.data)
        for name, module in named_modules(model)
        for kind in ("_parameters", "_buffers")
        for key, tensor in getattr(module, kind).items()
        if tensor is not None
    ]
    try:
        yield replaced
    finally:
        for name, module, kind, key, tensor, data in before:
            held = getattr(module, kind)
            if held.get(key) is not tensor or tensor.data.is_meta != data.is_meta:
                tensor.data = data
                held[key] = tensor
                replaced.append(f"{name}.{key}")


class _Recorder(TorchDispatchMode):
    """Follows tensors through views and copies; keeps writes from reaching the model, and notes them."""

    def __init__(self, model: torch.nn.Module, tensors: Sequence[tuple[str, torch.Tensor]], watched: Watched) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.trial = Trial()
        self._watched = watched
        self._targets = {_storage(buffer): "" for buffer in model.buffers()}
        self._targets |= {_storage(parameter): name for name, parameter in model.named_parameters()}
        self._origins = {_storage(tensor): frozenset((name,)) for name, tensor in tensors}
        self._scalars = {_storage(tensor) for _, tensor in tensors if tensor.numel() == 1}
        # A storage's address must not be used again while we tell storages apart by it.
        self._keep_alive: list[torch.Tensor] = [tensor for _, tensor in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own signature
        del types
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        origins = frozenset[str]().union(*(self._origins.get(_storage(tensor), ()) for tensor in inputs))
        written = inputs[0] if inputs and _writes_first_argument(func) else None
        if written is not None and _storage(written) in self._targets:
            self._note(func, written, inputs[1:], origins)
            return written
        if func is _aten._local_scalar_dense.default and origins:  # noqa: SLF001 - its name in ATen
            if _storage(inputs[0]) in self._scalars:
                return 1  # a lone scale, which loaders fill in by value
            raise NotImplementedError("a value was read")
        if func is _aten._to_copy.default and origins:  # noqa: SLF001 - its name in ATen
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(written if written is not None else result):
            if isinstance(tensor, torch.Tensor) and origins:
                self._origins[_storage(tensor)] = self._origins.get(_storage(tensor), frozenset()) | origins
                self._keep_alive.append(tensor)
        return result

    def _note(
        self, func: object, target: torch.Tensor, inputs: Sequence[torch.Tensor], origins: frozenset[str]
    ) -> None:
        if func is _aten.copy_.default and inputs and inputs[0].shape != target.shape and inputs[0].numel() > 1:
            raise rejection(
                self._watched.last,
                TensorSpec(inputs[0].dtype, tuple(inputs[0].shape)),
                ValueError(f"it would have to fit into shape {list(target.shape)}"),
            )
        name = self._targets[_storage(target)]
        origins = origins or frozenset((self._watched.last,))
        self.trial.placed |= origins
        if len(origins) > 1:
            self._join(origins)
        if not name:
            return
        self.trial.filled[name] = self.trial.filled.get(name, 0) + target.numel()
        self.trial.sources.setdefault(name, set()).update(origins)
        for origin in origins:
            self.trial.taken[origin] = self.trial.taken.get(origin, 0) + target.numel()

    def _join(self, names: frozenset[str]) -> None:
        group = names.union(*(self.trial.joined.get(name, ()) for name in names))
        self.trial.joined.update(dict.fromkeys(group, group))


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


def _storage(tensor: torch.Tensor) -> int:
    return cast("Any", tensor.untyped_storage())._cdata  # noqa: SLF001 - a meta tensor has no other identity


def _writes_first_argument(operator: object) -> bool:
    arguments = cast("Any", operator)._schema.arguments  # noqa: SLF001 - the only way to ask
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
