"""Stands in for SGLang's compiled kernels, of which there is no build for the CPU on PyPI.

SGLang computes with torch's own operators where the CPU has no AMX. It asks this package for three things even then.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import torch

__version__ = "0.4.10"

_library = torch.library.Library("sgl_kernel", "FRAGMENT")


def _operator(schema: str, function: object) -> None:
    _library.define(schema)
    _library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")


_operator("init_cpu_threads_env(str cores) -> str", lambda cores: f"threads are not bound to cores {cores}")
_operator("initialize(int size, int rank) -> ()", lambda size, rank: None)  # noqa: ARG005


def copy_all_layer_kv_cache_cpu(
    buffers: torch.Tensor, row_bytes: torch.Tensor, targets: torch.Tensor, sources: torch.Tensor
) -> None:
    """Moves rows of cached keys and values to other places, layer by layer."""
    moves = list(zip(targets.tolist(), sources.tolist(), strict=True))
    for buffer, size in zip(buffers.tolist(), row_bytes.tolist(), strict=True):
        # All rows are read before the first is written: a target may be another one's source.
        rows = [(target, ctypes.string_at(buffer + source * size, size)) for target, source in moves]
        for target, row in rows:
            ctypes.memmove(buffer + target * size, row, size)


def __getattr__(name: str) -> object:
    """Any other kernel can be imported, but not called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs SGLang's compiled kernels")

    return kernel
