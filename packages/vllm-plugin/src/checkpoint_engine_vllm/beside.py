"""Our worker methods beside those of another extension, which a framework names for itself.

`--worker-extension-cls` takes one class. Every name asked of this module is that of another extension, with colons for
its dots, and stands for a class that has the methods of both: `checkpoint_engine_vllm.beside.verl:workers:Extension`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoint_engine_vllm.extension import WorkerExtension

__all__ = ["BESIDE", "both", "name_beside"]

BESIDE = "_checkpoint_engine_beside"
"""What workers keep the other extension's name under."""

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see


def name_beside(other: str) -> str:
    """What to name in place of another extension."""
    return f"{__name__}.{other.replace('.', ':')}"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a class that is made here
    if name.startswith("__") or ":" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return both(name)


@functools.cache
def both(name: str) -> type[WorkerExtension]:
    """The other extension's methods, and ours. Where both have one, the other's wins, and vLLM's log says so."""
    ours: type[WorkerExtension] = importlib.import_module("checkpoint_engine_vllm.extension").WorkerExtension
    module, _, kind = name.replace(":", ".").rpartition(".")
    other: Any = getattr(importlib.import_module(module), kind)
    if issubclass(other, ours):
        return other
    covered = sorted(name for name in set(dir(other)) & set(vars(ours)) if not name.startswith("__"))
    if covered:
        logger.warning("%s has methods of its own for %s; those of checkpoint-engine are not used", name, covered)
    return type(kind, (other, ours), {"__module__": module, BESIDE: f"{module}.{kind}"})
