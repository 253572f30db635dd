"""What some quantised formats keep beside their parameters, so that vLLM itself cannot reload them under CUDA graphs.

A reload puts parameters back where captured graphs read them. A few kernels, however, make tensors of their own each
time that weights are processed, and the graphs go on reading the old ones: memory that now belongs to something else,
or old weights. No exception tells. Which kernels do so is looked up in the live model; a vLLM that has mended it is
recognised by what its kernels no longer hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch


@dataclass(frozen=True)
class Held:
    """A tensor that a kernel makes anew for each reload."""

    what: str
    mended_in: str
    """The first version of vLLM seen to keep it; empty: none yet."""
    instead: str
    """An option of vLLM that avoids it."""
    source: str


_EAGER = "--enforce-eager"
_OTHER_EXPERTS = "--moe-backend triton or --enforce-eager"

HELD: Mapping[str, Held] = {
    "workspace": Held("the work space of Marlin kernels", "0.32", _EAGER, "vllm#48438"),
    "g_idx_sort_indices": Held("the order of a Marlin kernel's groups", "0.32", _EAGER, "vllm#48438"),
    "ab_strides1": Held("the strides of CUTLASS experts", "", _OTHER_EXPERTS, "vllm#41670"),
    "gemm1_alpha": Held("the constants of FlashInfer's experts", "", _OTHER_EXPERTS, "vllm#50521"),
    "w1_sf_mma": Held("the scales of FlashInfer's B12x experts", "", _OTHER_EXPERTS, "vllm#50538"),
    "W_UV": Held("the projections of latent attention (MLA)", "0.26", _EAGER, "vllm#48251"),
}
"""By the name of the attribute."""

_PROCESSORS = {"quant_method", "scheme"}
_PROCESSED = _PROCESSORS | {"W_UV"}
_DEPTH = 3
"""From a layer's method to its scheme, kernel and experts."""


def unreloadable(model: torch.nn.Module, *, graphs: bool) -> list[str]:
    """Says for each kind of tensor that captured graphs would go on reading which layer holds it, and what to do.

    Args:
        model: The served model, with weights.
        graphs: Whether CUDA graphs are captured; without them nothing is in the way.
    """
    if not graphs:
        return []
    tensors = (*model.parameters(), *model.buffers())
    kept = {_address(tensor) for tensor in tensors} - {0}
    found: dict[str, str] = {}
    for name, layer in cast("Iterator[tuple[str, torch.nn.Module]]", cast("Any", model).named_modules()):
        for attribute, tensor in _held_by_layer(layer):
            if attribute in HELD and attribute not in found and _address(tensor) not in kept:
                found[attribute] = _sentence(name, HELD[attribute])
    return list(found.values())


def _sentence(layer: str, held: Held) -> str:
    remedy = f"vLLM {held.mended_in} or newer, or {held.instead}" if held.mended_in else held.instead
    return f"layer {layer!r}: {held.what} ({held.source}; use {remedy})"


def _held_by_layer(layer: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Plain tensors of a layer that is processed after loading, and of what processes it."""
    if not _PROCESSED & vars(layer).keys():
        return
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif name in _PROCESSORS:
            yield from _held_by(value, _DEPTH)


def _held_by(owner: object, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are plain attributes of an object, or of those that it consists of; no module's."""
    if isinstance(owner, (torch.nn.Module, type)):
        return
    for name, value in getattr(owner, "__dict__", dict[str, object]()).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif depth:
            yield from _held_by(value, depth - 1)


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta or not tensor.numel() else tensor.data_ptr()
