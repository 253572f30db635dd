"""Every tensor that can be reached from a model: what it may compute with, registered or not.

Engines keep weights in more places than parameters and buffers: in plain attributes, lists and dictionaries, in objects
of kernels and quantisation methods, in what a function has closed over, beside a parameter. An update that leaves one
of these as it was leaves old weights behind.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from checkpoint_engine.reload.overheads import without_functions
from checkpoint_engine.reload.proof import Checksums

__all__ = ["HeldTensors", "Reached", "reach"]

_DEEPEST = 12
"""Objects within objects."""
_FOREIGN = frozenset(("torch", "numpy", "transformers", "logging", "threading", "asyncio", "weakref", "typing", "re"))
"""Packages whose objects hold no weights, but lead to much else."""
_PLAIN = (str, bytes, int, complex, type, types.ModuleType, torch.dtype, torch.device, type(None))
_REGISTERED = ("_parameters", "_buffers")
_OF_MODULES = frozenset(vars(torch.nn.Module()))


@dataclass(frozen=True)
class Reached:
    """A tensor, and how a model comes to it."""

    module: str
    """Name of the module that holds it."""
    own: str
    """From there on, such as `weight` or `quant_method.kernel.packed`."""
    tensor: torch.Tensor
    registered: bool
    """Whether it is a parameter or buffer of that module."""

    @property
    def path(self) -> str:
        """From the model on."""
        return f"{self.module}.{self.own}" if self.module else self.own


def reach(
    model: torch.nn.Module, left_out: Collection[str] = (), *, only: torch.nn.Module | None = None
) -> Iterator[Reached]:
    """Goes through all tensors that a model holds, and numbers with a fraction (a scale may be one), as tensors.

    What is held in two places comes twice.

    Args:
        model: Whose modules are gone through, by their names.
        left_out: Attributes that are passed over, such as caches of requests, and packages whose objects are.
        only: One of its modules, if the others are of no interest.
    """
    named = list(cast("Iterable[tuple[str, torch.nn.Module]]", cast("Any", model).named_modules()))
    registered = {id(module) for _, module in named}
    for name, module in named:
        if only is None or module is only:
            yield from _Holding(name, module, registered, frozenset(left_out)).tensors()


class _Holding:
    """What one module holds, but for its submodules."""

    def __init__(
        self, name: str, module: torch.nn.Module, registered: Collection[int], left_out: frozenset[str]
    ) -> None:
        self._name, self._module = name, module
        self._left_out = left_out
        self._known = set(registered)
        """Objects that need not be looked into (again)."""

    def tensors(self) -> Iterator[Reached]:
        for own, tensor in self._registered(self._module):
            yield from self._of_tensor(own, tensor, registered=True)
        yield from self._of_parts("", self._plain(self._module), 0)

    @staticmethod
    def _registered(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for held in _REGISTERED:
            yield from ((own, tensor) for own, tensor in vars(module)[held].items() if tensor is not None)

    @staticmethod
    def _plain(module: torch.nn.Module) -> list[tuple[object, object]]:
        return [(own, value) for own, value in vars(module).items() if own not in _OF_MODULES]

    def _of_parts(self, path: str, parts: Iterable[tuple[object, object]], depth: int) -> Iterator[Reached]:
        for own, value in list(parts):
            if str(own) not in self._left_out:
                yield from self._of_value(f"{path}.{own}" if path else str(own), value, depth)

    def _of_value(self, path: str, value: object, depth: int) -> Iterator[Reached]:
        if isinstance(value, torch.Tensor):
            yield from self._of_tensor(path, value, registered=False)
        elif isinstance(value, float):
            number = torch.tensor(value, dtype=torch.float64, device="cpu")
            yield Reached(self._name, path, number, registered=False)
        elif isinstance(value, _PLAIN) or id(value) in self._known or depth > _DEEPEST:
            return
        elif isinstance(value, torch.nn.Module):  # held without being registered
            for inner, module in cast("Any", value).named_modules():
                self._known.add(id(module))
                parts = (*self._registered(module), *self._plain(module))
                yield from self._of_parts(f"{path}.{inner}" if inner else path, parts, depth + 1)
        else:
            self._known.add(id(value))
            yield from self._of_parts(path, _parts_of(value, self._left_out), depth + 1)

    def _of_tensor(self, path: str, tensor: torch.Tensor, *, registered: bool) -> Iterator[Reached]:
        inner = _inner_tensors(tensor)
        for own, each in inner.items():
            yield Reached(self._name, f"{path}.{own}" if own else path, each, registered)
        for own, value in vars(tensor).items():
            if isinstance(value, torch.Tensor) and own not in inner and own not in self._left_out:
                yield Reached(self._name, f"{path}.{own}", value, registered=False)


def _inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a tensor that only wraps others has inside; itself, for all others."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return {"": tensor}
    found: dict[str, torch.Tensor] = {}
    for name in cast("tuple[list[str], object]", flatten(tensor))[0]:
        for own, each in _inner_tensors(getattr(tensor, name)).items():
            found[f"{name}.{own}" if own else name] = each
    return found


def _parts_of(value: object, left_out: Collection[str]) -> Iterator[tuple[object, object]]:
    """What an object is made of."""
    if isinstance(value, Mapping):
        with contextlib.suppress(Exception):  # some answer only to the names that they know
            yield from list(cast("Mapping[object, object]", value).items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from enumerate(cast("Iterable[object]", value))
    elif isinstance(value, functools.partial):
        yield from (("func", cast("object", value.func)), *enumerate(value.args), *value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, types.FunctionType):
        if _is_foreign(str(value.__globals__.get("__name__")), left_out):  # its own name may be that of what it wraps
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not filled yet
                yield name, cell.cell_contents
        yield from enumerate(value.__defaults__ or ())
    elif _is_looked_into(type(value), left_out):
        yield from getattr(value, "__dict__", dict[str, object]()).items()
        yield from ((name, getattr(value, name)) for name in _slots_of(type(value)) if hasattr(value, name))


@functools.cache
def _slots_of(kind: type) -> tuple[str, ...]:
    slots = [vars(each).get("__slots__", ()) for each in kind.__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    return tuple(name for name in names if not name.startswith("__"))


def _is_looked_into(kind: type, left_out: Collection[str]) -> bool:
    return not _is_foreign(kind.__module__, left_out) and not kind.__name__.endswith("Config")


def _is_foreign(module: str, left_out: Collection[str]) -> bool:
    return module.partition(".")[0] in _FOREIGN or any(module.startswith(name) for name in left_out if "." in name)


class HeldTensors:
    """What a model held at one moment, by checksums; the tensors themselves may go."""

    def __init__(self, found: Iterable[Reached], checksums: Checksums) -> None:
        """Takes the checksums of these; waits for their devices."""
        self._checksums = checksums
        self._held = _contents(list(found), checksums)

    def __contains__(self, path: object) -> bool:
        return path in self._held

    def differing(self, found: Iterable[Reached]) -> list[Reached]:
        """Those of the tensors found now that were not there, or not with these elements."""
        now = list(found)
        contents = _contents(now, self._checksums)
        return [each for each in now if self._held.get(each.path) != contents[each.path]]


_Contents = tuple[torch.Size, torch.dtype, int | None]
"""Shape, dtype, and the checksum where there is any data."""


def _contents(found: Sequence[Reached], checksums: Checksums) -> dict[str, _Contents]:
    """By path."""
    places = {each.path: _place(each.tensor) for each in found}
    once = {places[each.path]: each.tensor for each in found if _has_data(each.tensor)}
    with torch.no_grad(), without_functions():
        sums = _sums(once, checksums)
    return {each.path: (each.tensor.shape, each.tensor.dtype, sums.get(places[each.path])) for each in found}


_Place = tuple[object, ...]
"""Two tensors with the same one hold the same."""


def _place(tensor: torch.Tensor) -> _Place:
    if tensor.layout != torch.strided or not _has_data(tensor):
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype)


def _has_data(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0


def _sums(tensors: Mapping[_Place, torch.Tensor], checksums: Checksums) -> dict[_Place, int]:
    found: dict[torch.device, list[tuple[_Place, torch.Tensor]]] = {}
    for place, tensor in tensors.items():
        plain = tensor.to_dense() if tensor.layout != torch.strided or tensor.is_mkldnn else tensor
        found.setdefault(tensor.device, []).append((place, checksums.of(plain.detach())))
    known: dict[_Place, int] = {}
    for pairs in found.values():  # one wait for each device
        values = cast("list[int]", cast("Any", torch.stack([each for _, each in pairs])).tolist())
        known.update(zip((place for place, _ in pairs), values, strict=True))
    return known
