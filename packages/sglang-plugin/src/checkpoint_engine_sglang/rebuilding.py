"""A layer that SGLang has processed takes new weights: in memory of the first layout, from which it is processed anew.

The result goes to where the layer's tensors were, so that CUDA graphs that read them there stay right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, cast

import torch

from checkpoint_engine.sdk import WorkerError
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.layouts import LayerLayout, owners

__all__ = ["OpenLayer", "attributes", "process", "process_in_place", "put_back", "tensors_in"]

_DEEPEST = 4
"""Levels of lists, dictionaries and records in which tensors are looked for."""
_TORCHS_OWN = ("_parameters", "_buffers", "_modules")
"""Where a module keeps what it has registered."""


class OpenLayer:
    """A layer in its first layout, from `__init__` until `close` or `undo`."""

    def __init__(self, name: str, module: torch.nn.Module, layout: LayerLayout, runner: Runner) -> None:
        self.name = name
        self.module = module
        self._layout = layout
        self._runner = runner
        self._before = [(owner, dict(vars(owner))) for owner in owners(module)]
        held = vars(module)
        self._parameters, self._buffers = held["_parameters"], held["_buffers"]
        for own, _ in layout.slots:
            held.pop(own, None)
        held["_parameters"] = {own: slot and slot.make(runner.device) for own, slot in layout.parameters.items()}
        held["_buffers"] = {own: slot and slot.make(runner.device) for own, slot in layout.buffers.items()}
        for (owner, before), plain in zip(self._before, layout.plain, strict=True):
            vars(owner).update({key: value for key, value in plain.items() if _is_other(before.get(key), value)})

    def tensor(self, own: str) -> torch.Tensor | None:
        """A parameter or buffer in its first layout."""
        return compat.own_tensor(self.module, own)

    def close(self) -> None:
        """Has SGLang process the new weights, and puts the result in the place of the old ones.

        Raises:
            WorkerError: SGLang fails, or makes something of another shape than before.
        """
        process(self.name, self.module, self._runner)
        for (owner, before), plain in zip(self._before, self._layout.plain, strict=True):
            held = {**self._parameters, **self._buffers} if owner is self.module else {}
            old = {**_attributes_of(before), **{name: value for name, value in held.items() if value is not None}}
            put_back(self.name, owner, old, self._runner)
            now = vars(owner)
            for key, value in plain.items():
                # What processing leaves as it was at first, and was something else: somebody else has changed it.
                if key in before and not _is_other(now.get(key), value) and _is_other(before[key], value):
                    now[key] = before[key]
            _refuse_new_numbers(self.name, before, now, self._runner)

    def processed(self) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
        """Has SGLang process the new weights; gives name, old and new value of each tensor. `undo` must follow.

        What processes the layer may hold some of them itself.

        Raises:
            WorkerError: SGLang fails.
        """
        process(self.name, self.module, self._runner)
        for owner, before in self._before:
            registered = {**self._parameters, **self._buffers} if owner is self.module else {}
            for own, old in {**_attributes_of(before), **registered}.items():
                new = getattr(owner, own, None)
                pairs = zip_longest(tensors_in(old), tensors_in(new)) if new is not old else ()
                yield from ((own, one, other) for one, other in pairs if one is None or one.numel())

    def undo(self) -> None:
        """Puts the old weights back: nothing of them has changed."""
        for owner, before in self._before:
            vars(owner).clear()
            vars(owner).update(before)


def process(name: str, module: torch.nn.Module, runner: Runner) -> None:
    """Has SGLang pack, transpose or quantise a layer's weights, if it does so to layers of this kind.

    Raises:
        WorkerError: it fails.
    """
    method = compat.processing_of(module)
    if method is None:
        return
    try:
        with compat.loading_context(module, runner.device):
            method.process_weights_after_loading(module)
    except Exception as error:
        raise WorkerError(
            f"layer {name} of the {runner.role} model: its weights were loaded but cannot be processed: "
            f"{type(error).__name__}: {error}"
        ) from error


def process_in_place(name: str, module: torch.nn.Module, runner: Runner) -> None:
    """The same for a layer that keeps its weights as they come; what it holds besides them stays where it is."""
    before = attributes(module)
    process(name, module, runner)
    put_back(name, module, before, runner)


def attributes(module: torch.nn.Module) -> dict[str, object]:
    """What a module holds in tensors besides its parameters and buffers."""
    return _attributes_of(vars(module))


def put_back(name: str, owner: object, before: Mapping[str, object], runner: Runner) -> None:
    """Copies what a layer (or what processes it) holds now to where it was `before`, and has it hold that again.

    Raises:
        WorkerError: something has another shape or dtype than it had.
    """
    for own, old in before.items():
        new = getattr(owner, own, None)
        if new is old or (new is None and hasattr(owner, own)):
            continue
        if hasattr(owner, own):
            _copy(f"layer {name} of the {runner.role} model", own, new, old)
        _set(owner, own, old)


def _copy(layer: str, own: str, new: object, old: object) -> None:
    old_tensors, new_tensors = list(tensors_in(old)), list(tensors_in(new))
    same = len(old_tensors) == len(new_tensors) and all(
        (one.shape, one.dtype) == (other.shape, other.dtype)
        for one, other in zip(old_tensors, new_tensors, strict=True)
    )
    if not same:
        raise WorkerError(
            f"{layer}: SGLang made something of another shape or dtype of its {own} "
            f"({_described(new_tensors)}, not {_described(old_tensors)}): start it anew with these weights"
        )
    for one, other in zip(old_tensors, new_tensors, strict=True):
        if one.data_ptr() != other.data_ptr():
            one.data.copy_(other.data)
    if isinstance(old, torch.nn.Parameter) and isinstance(new, torch.Tensor):
        vars(old).update(vars(new))


def _refuse_new_numbers(name: str, before: Mapping[str, object], now: Mapping[str, object], runner: Runner) -> None:
    """CUDA graphs have plain numbers within them, where no update reaches them.

    Raises:
        WorkerError: such a number has changed.
    """
    for key, old in before.items():
        new = now.get(key)
        if runner.has_graphs and isinstance(old, float) and isinstance(new, float) and old != new:
            raise WorkerError(
                f"layer {name} of the {runner.role} model: its {key} was {old} and is {new} with these weights, and "
                "CUDA graphs that SGLang has captured go on with the old one; start it with --disable-cuda-graph"
            )


def tensors_in(value: object, depth: int = _DEEPEST) -> Iterator[torch.Tensor]:
    """Tensors that a value is, or has in lists, tuples, dictionaries or records."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for item in cast("list[object]", value):
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in cast("dict[object, object]", value).values():
            yield from tensors_in(item, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), depth - 1)


def _attributes_of(held: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value for name, value in held.items() if name not in _TORCHS_OWN and any(True for _ in tensors_in(value))
    }


def _set(owner: object, own: str, value: object) -> None:
    """As the owner had it: torch keeps a module's parameters, buffers and other attributes apart."""
    held: dict[str, Any] = vars(owner)
    if isinstance(owner, torch.nn.Module):
        kind = "_parameters" if isinstance(value, torch.nn.Parameter) else "_buffers" if own in held["_buffers"] else ""
        for other in {"_parameters", "_buffers"} - {kind}:
            held[other].pop(own, None)
        if kind:
            held.pop(own, None)
            held[kind][own] = value
            return
    held[own] = value


def _is_other(one: object, other: object) -> bool:
    return type(one) is not type(other) or one != other


def _described(tensors: list[torch.Tensor]) -> str:
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors)
