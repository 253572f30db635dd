"""What a model computes from its weights and keeps beside them, such as `w_kc` and `w_vc` of DeepSeek's attention."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_engine.sdk import WorkerError
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.rebuilding import tensors_in

__all__ = ["Derived", "OverwritesWeightsError", "derive", "derive_apart"]

_PARAMETERS, _BUFFERS, _MODULES = "_parameters", "_buffers", "_modules"
"""Where a module keeps what it has registered."""


class OverwritesWeightsError(Exception):
    """A model that derives something anew changes its weights thereby."""


def derive(runner: Runner) -> None:
    """Has a model compute anew what it keeps besides its parameters.

    Raises:
        WorkerError: it fails.
    """
    try:
        for module in compat.deriving_modules(runner.model):
            compat.derive(module, runner.config)
    except OverwritesWeightsError:
        raise
    except Exception as error:
        raise WorkerError(
            f"the {runner.role} model failed to derive what it computes from its weights: "
            f"{type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class Derived:
    """One tensor or number that a model has derived; None where only the other side has it."""

    name: str
    held: torch.Tensor | None
    expected: torch.Tensor | None


def derive_apart(runner: Runner, besides: Collection[torch.nn.Module]) -> list[Derived]:
    """Has a model derive things from its weights as they are now, beside those that it holds, which stay as they are.

    Args:
        runner: The model.
        besides: Modules whose own tensors are not of interest.

    Raises:
        OverwritesWeightsError: that cannot be had without a change of its weights; there was none.
        WorkerError: it fails.
    """
    modules = [(name, module, dict(vars(module))) for name, module in compat.named_modules(runner.model)]
    weights = {_place(tensor) for _, module, _ in modules for tensor in module.parameters(recurse=False)}
    copies = _Copies(weights)
    watch = _Watch(
        weights | {_place(tensor) for _, _, held in modules for tensor in tensors_in([*_own(held).values()])}
    )
    try:
        given = [_lay_aside(module, copies) for _, module, _ in modules]
        with torch.no_grad(), watch:
            derive(runner)
        return [
            derived
            for (name, module, before), copied in zip(modules, given, strict=True)
            if module not in besides
            for derived in _changes(name, _own(before), copied, _own(vars(module)), watch)
        ]
    finally:
        for _, module, before in modules:
            vars(module).clear()
            vars(module).update(before)


def _lay_aside(module: torch.nn.Module, copies: _Copies) -> dict[str, object]:
    """Gives a module copies of all that may be derived."""
    held = vars(module)
    held[_PARAMETERS] = dict(held[_PARAMETERS])
    held[_BUFFERS] = {own: copies.of(value) for own, value in held[_BUFFERS].items()}
    held.update({own: copies.of(value) for own, value in held.items() if own not in (_PARAMETERS, _BUFFERS, _MODULES)})
    return _own(held)


def _own(held: Mapping[str, Any]) -> dict[str, object]:
    """What a module has itself, whatever torch keeps it as."""
    plain = {own: value for own, value in held.items() if own not in (_PARAMETERS, _BUFFERS, _MODULES)}
    return {**plain, **held[_PARAMETERS], **held[_BUFFERS]}


def _changes(
    module: str, held: Mapping[str, object], given: Mapping[str, object], now: Mapping[str, object], watch: _Watch
) -> Iterator[Derived]:
    for own in sorted(given.keys() | now.keys()):
        if now.get(own) is not given.get(own) or watch.has_seen_written(now.get(own)):
            for old, new in zip_longest(_comparable(held.get(own)), _comparable(now.get(own))):
                yield Derived(f"{module}.{own}".lstrip("."), old, new)


def _comparable(value: object) -> Iterable[torch.Tensor]:
    """Numbers too: a scale may be one."""
    return [torch.tensor(value, dtype=torch.float64)] if isinstance(value, float) else tensors_in(value)


class _Copies:
    """Copies of tensors that are no weights, each made once."""

    def __init__(self, weights: Collection[int]) -> None:
        self._weights = weights
        self._made: dict[int, torch.Tensor] = {}

    def of(self, value: object) -> object:
        """A copy of a tensor, or of a list, tuple or dictionary of such; all else as it is."""
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        if not any(True for _ in tensors_in(value)):
            return value
        if type(value) is dict:
            return {key: self.of(item) for key, item in cast("dict[object, object]", value).items()}
        if type(value) is list:
            return [self.of(item) for item in cast("list[object]", value)]
        if type(value) is tuple:
            return tuple(self.of(item) for item in cast("tuple[object, ...]", value))
        return value

    def _of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if _place(tensor) in self._weights:
            return tensor
        if id(tensor) not in self._made:
            with torch.inference_mode(mode=False):  # so that it can be written wherever the model does so
                self._made[id(tensor)] = tensor.detach().clone()
        return self._made[id(tensor)]


class _Watch(TorchDispatchMode):
    """Sees what is written, and keeps it from being what the model holds."""

    def __init__(self, held: Collection[int]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._held = held
        self._written: set[int] = set()

    def has_seen_written(self, value: object) -> bool:
        """Whether a tensor in it was changed."""
        return any(_place(tensor) in self._written for tensor in tensors_in(value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own signature
        del types
        named: dict[str, Any] = kwargs or {}
        for index, name in _written_arguments(func):
            for tensor in tensors_in(args[index] if index < len(args) else named.get(name)):
                if _place(tensor) in self._held and tensor.numel():
                    raise OverwritesWeightsError(f"{func} writes into what the model holds")
                self._written.add(_place(tensor))
        return func(*args, **named)


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:  # noqa: ANN401 - torch's own types
    return [
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)  # noqa: SLF001 - the only way to ask
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
