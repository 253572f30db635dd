"""Stands in for packages that models import for their pictures, and that an environment for the CPU lacks.

Nothing of them is called: the zoo loads models and runs none.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

__all__ = ["stand_in_for"]


class _Names(type):
    """Of classes that have every name, as enumerations are asked for theirs."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(ModuleType):
    """A module in which every name is a class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Names(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == self._package else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Anything(spec.name)
        if spec.name == self._package:
            module.__version__ = "0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


def stand_in_for(package: str) -> None:
    """Has imports of a package succeed where it is not installed."""
    if importlib.util.find_spec(package) is None:
        sys.meta_path.append(_Finder(package))
