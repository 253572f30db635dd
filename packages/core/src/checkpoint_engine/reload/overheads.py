"""What Python and torch do beside the work, put off while very many tensors are gone through."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

__all__ = ["deferred_garbage", "without_functions"]


@contextlib.contextmanager
def deferred_garbage() -> Generator[None]:
    """Puts off the collection of garbage: it would go, again and again, through all that an engine's process holds."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def without_functions() -> AbstractContextManager[None]:
    """Leaves out what torch calls in Python before each operator, as for a default device: each costs as much again.

    New tensors are then on the CPU unless they are told otherwise.
    """
    return cast("Any", torch)._C.DisableTorchFunction()  # noqa: SLF001 - torch has no public name for it
