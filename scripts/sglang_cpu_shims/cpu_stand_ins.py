"""Lets SGLang import on a machine without a GPU. Loaded at start-up of Python by `cpu_stand_ins.pth`.

- Triton is not needed to run on the CPU, but imported everywhere: an empty shell of it takes its place.
- PyPI's torchvision is built for CUDA; it imports beside a CPU build of torch once two of its operators have names.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec


class _Shell(types.ModuleType):
    """A module with every attribute one may ask for: classes under capitalised names, else modules."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        found = (
            type(name, (), {"__module__": self.__name__}) if name[0].isupper() else _shell(f"{self.__name__}.{name}")
        )
        setattr(self, name, found)
        return found

    def __call__(self, *args: object, **kwargs: object) -> object:
        """As a decorator, `@jit` or `@jit(…)`: leaves the function as it is."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function


def _shell(name: str) -> _Shell:
    if name not in sys.modules:
        module = _Shell(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, _Finder.instance, is_package=True)
        sys.modules[name] = module
    return sys.modules[name]  # type: ignore[return-value]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    instance: _Finder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name == "torchvision._meta_registrations":
            _name_operators_of_torchvision()
        if name.partition(".")[0] == "triton":
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _shell(spec.name)
        if spec.name == "triton":
            _furnish(module)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _Settings:
    """Takes whatever it is given."""

    def __init__(self, *values: object, **named: object) -> None:
        self.value = values[0] if values else None
        self.named = named


def _furnish(triton: types.ModuleType) -> None:
    """What is used while modules are imported, not only named."""
    triton.__version__ = "3.0.0"
    triton.cdiv = lambda size, step: -(-size // step)
    triton.next_power_of_2 = lambda size: 1 << (size - 1).bit_length() if size > 0 else 1
    triton.Config = _Settings
    language = _shell("triton.language")
    language.constexpr = _Settings
    triton.language = language
    _shell("triton.backends").backends = {}


_libraries: list[object] = []


def _name_operators_of_torchvision() -> None:
    if _libraries:
        return
    import torch  # noqa: PLC0415 - only SGLang's processes are to import it

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


# SGLang compiles small functions at their first use: a minute each start, for nothing on models this small.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
_Finder.instance = _Finder()
if importlib.machinery.PathFinder.find_spec("triton") is None:
    sys.meta_path.insert(0, _Finder.instance)
