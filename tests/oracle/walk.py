"""Everything that a served model computes with and that can be reached from the model object, digested.

Parameters and buffers; tensors and numbers kept as plain attributes, in lists, tuples, dictionaries and sets, also of
the objects that a module holds (kernels, quantisation methods, rotary embeddings), of functions' closures, of partial
functions and of bound methods; and of modules that are held without being registered. What only a kernel can read
(weights packed behind a handle) is not to be reached so: see `packed.py`.

    contents(model)  ->  {"layers.0.mlp.weight": "bfloat16[4, 8] 5f0c…", "layers.0.attn.impl.scale": "0.25", …}

Two processes that load the same checkpoint give the same contents; `differences` says where they do not.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from tests.oracle.digest import digest

Contents = dict[str, str]
"""Path from the model -> what is there."""

FOREIGN = frozenset(
    ("torch", "numpy", "transformers", "logging", "threading", "asyncio", "weakref", "typing", "re", "os", "pathlib")
)
"""Packages whose objects are not looked into: they hold no weights of a model, but much of the process."""
REQUESTS = frozenset(("kv_cache", "kv_caches", "kv_cache_scales"))
SETTINGS = frozenset(("config", "vllm_config", "hf_config", "server_args", "weight_loader"))
LEFT_OUT = frozenset({*REQUESTS, *SETTINGS, "handler_tensor"})
"""Attributes that are not weights: addresses, what requests have computed, and settings."""
_DEEPEST = 12
"""Objects in objects; nothing that computes lies deeper."""
_OF_MODULES = frozenset(vars(torch.nn.Module())) - {"_parameters", "_buffers"}
"""What torch itself keeps in each module."""


def contents(
    model: torch.nn.Module,
    probes: Sequence[Callable[[torch.nn.Module], Mapping[str, torch.Tensor]]] = (),
    left_out: Collection[str] = (),
) -> Contents:
    """Digests what a model computes with.

    Args:
        model: A served model.
        probes: Called with each module; what they return is digested as if the module held it by that name.
        left_out: Attributes that are passed over, besides `LEFT_OUT`.
    """
    walk = _Walk(LEFT_OUT | set(left_out))
    for path, module in walk.over(model):
        for probe in probes:
            for name, tensor in probe(module).items():
                walk.found[_join(path, name)] = digest(tensor)
    return walk.found


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors themselves that `contents` digests, by path."""
    walk = _Walk(LEFT_OUT)
    for _ in walk.over(model):
        pass
    return walk.tensors


def differences(mine: Mapping[str, str], cold: Mapping[str, str]) -> list[str]:
    """Says where two contents are not the same: `path: mine, not cold`, sorted by path."""
    missing = "nothing"
    return [
        f"{path}: {mine.get(path, missing)}, not {cold.get(path, missing)}"
        for path in sorted(mine.keys() | cold.keys())
        if mine.get(path) != cold.get(path)
    ]


class _Walk:
    def __init__(self, left_out: Collection[str]) -> None:
        self.found: Contents = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.modules: deque[tuple[str, torch.nn.Module]] = deque()
        self._known: set[int] = set()
        self._left_out = left_out
        self._digests: dict[tuple[object, ...], str] = {}
        self._alive: list[torch.Tensor] = []
        """Addresses tell tensors apart only as long as they live."""

    def over(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
        """Looks at everything; yields each module that was looked at."""
        self.add("", model)
        while self.modules:
            path, module = self.modules.popleft()
            self.module(path, module)
            yield path, module

    def add(self, path: str, module: torch.nn.Module) -> None:
        """Will look at a module and all below it, under each of their names."""
        for name, each in module.named_modules(remove_duplicate=False):
            self.modules.append((_join(path, name), each))
            self._known.add(id(each))

    def module(self, path: str, module: torch.nn.Module) -> None:
        """Looks at what one module holds, but for its registered children, which come by themselves."""
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name not in self._left_out:
                self._tensor(_join(path, name), tensor, 0)
        plain = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        plain = {name: value for name, value in plain.items() if name not in {"_parameters", "_buffers"}}
        self._parts(path, plain.items(), 0, {id(module)})

    def _parts(self, path: str, parts: Any, depth: int, above: set[int]) -> None:
        for name, value in sorted(parts, key=lambda part: str(part[0])):
            if str(name) not in self._left_out:
                self._value(_join(path, str(name)), value, depth, above)

    def _value(self, path: str, value: Any, depth: int, above: set[int]) -> None:
        """Looks at anything; `above` are the objects that it lies in, which are not looked into again."""
        if isinstance(value, torch.Tensor):
            self._tensor(path, value, depth)
        elif isinstance(value, torch.nn.Module):
            if id(value) not in self._known:
                self.add(path, value)
        elif isinstance(value, (bool, int, float, complex, torch.dtype)):
            self.found[path] = str(value)
        elif isinstance(value, enum.Enum):
            self.found[path] = value.name
        elif depth < _DEEPEST and id(value) not in above:
            self._parts(path, _parts_of(value), depth + 1, above | {id(value)})

    def _tensor(self, path: str, tensor: torch.Tensor, depth: int) -> None:
        key = (tensor.data_ptr() if _has_address(tensor) else id(tensor), tensor.shape, tensor.dtype, _strides(tensor))
        if key not in self._digests:
            self._alive.append(tensor)
            self._digests[key] = digest(tensor)
        self.found[path] = self._digests[key]
        self.tensors[path] = tensor
        beside = [(name, value) for name, value in vars(tensor).items() if isinstance(value, torch.Tensor)]
        if depth < _DEEPEST:
            self._parts(path, beside, depth + 1, set())


def _parts_of(value: Any) -> Iterator[tuple[object, Any]]:
    """What an object is made of: elements, attributes, what a function has closed over."""
    if isinstance(value, Mapping):
        yield from _values_of(value)
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from enumerate(sorted((each for each in value if isinstance(each, (int, float))), key=str))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), *enumerate(value.args), *value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _closure_of(value)
        yield from enumerate(value.__defaults__ or ())
    elif _is_looked_into(value):
        yield from vars(value).items()
        yield from ((name, getattr(value, name)) for name in _slots_of(value) if hasattr(value, name))


def _values_of(mapping: Mapping[Any, Any]) -> Iterator[tuple[object, Any]]:
    try:
        yield from list(mapping.items())
    except Exception:  # noqa: BLE001 - some answer only to the names they know
        return


def _closure_of(function: types.FunctionType) -> Iterator[tuple[object, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents


def _is_looked_into(value: Any) -> bool:
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if package in FOREIGN or isinstance(value, (type, types.ModuleType)) or kind.__name__.endswith("Config"):
        return False
    return hasattr(value, "__dict__")


def _slots_of(value: Any) -> list[str]:
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    return [name for each in slots for name in ((each,) if isinstance(each, str) else each) if name != "__dict__"]


def _has_address(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0 and not tensor.is_mkldnn


def _strides(tensor: torch.Tensor) -> object:
    return tensor.stride() if tensor.layout == torch.strided else id(tensor)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
