"""What some quantised formats keep beside their parameters, so that vLLM itself cannot reload them under CUDA graphs.

A reload puts parameters back where captured graphs read them. A few kernels, however, make tensors of their own each
time that weights are processed, and the graphs go on reading the old ones: memory that now belongs to something else,
or old weights. No exception tells. Which kernels do so is looked up in the live model; a vLLM that has mended it is
recognised by what its kernels no longer hold.

One kernel for the CPU cannot be reloaded at all: vLLM throws away the parameter that it packed it from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

__all__ = ["HELD", "KernelTensor", "unreloadable"]


@dataclass(frozen=True)
class KernelTensor:
    """A tensor that a kernel makes anew for each reload."""

    what: str
    mended_in: str
    """The first version of vLLM seen to keep it; empty: none yet."""
    instead: str
    """An option of vLLM that avoids it."""
    source: str


_EAGER = "--enforce-eager"
_OTHER_EXPERTS = "--moe-backend triton or --enforce-eager"

HELD: Mapping[str, KernelTensor] = {
    "workspace": KernelTensor("the work space of Marlin kernels", "0.32", _EAGER, "vllm#48438"),
    "g_idx_sort_indices": KernelTensor("the order of a Marlin kernel's groups", "0.32", _EAGER, "vllm#48438"),
    "c_strides1": KernelTensor("the strides of CUTLASS experts", "", _OTHER_EXPERTS, "vllm#41670"),
    "token_expert_indices": KernelTensor("the scratch memory of experts", "0.32", _OTHER_EXPERTS, "vllm#48312"),
    "gemm1_alpha": KernelTensor("the constants of FlashInfer's experts", "", _OTHER_EXPERTS, "vllm#50521"),
    "gemm1_clamp_limit": KernelTensor("the limits of FlashInfer's experts", "", _OTHER_EXPERTS, "vllm#50521"),
    "fake_input_scale": KernelTensor("the input scales of FlashInfer's experts", "", _OTHER_EXPERTS, "vllm#50521"),
    "w1_sf_mma": KernelTensor("the scales of FlashInfer's B12x experts", "", _OTHER_EXPERTS, "vllm#50538"),
    "w13_precision_config": KernelTensor(
        "the weights of OpenAI's Triton experts (MXFP4)", "", "--moe-backend marlin or --enforce-eager", "vllm#49695"
    ),
    "W_UV": KernelTensor("the projections of latent attention (MLA)", "0.26", _EAGER, "vllm#48251"),
}
"""By the name of the attribute."""

_AMX = "is_amx_bmm_enabled"
"""An attribute of latent attention, true where a CPU's AMX kernels hold its projections (0.31 to 0.33 at least)."""

_SETTINGS = (int, float, str, type(None))
"""Of a layer's configuration, where it calls a number as a kernel calls the tensor that it makes of it."""
_PROCESSORS = ("quant_method", "scheme")
_DEPTH = 5
"""From a layer's method to its kernel, that one's implementation, experts, those they choose, and their scratch."""


def unreloadable(model: torch.nn.Module, *, graphs: bool) -> list[str]:
    """Says for each kind of tensor that an update would not reach which layer holds it, and what to do.

    Args:
        model: The served model, with weights.
        graphs: Whether CUDA graphs are captured, which go on reading what kernels have made anew.
    """
    found: dict[str, str] = {}
    for name, layer in _named_modules(model):
        if getattr(layer, _AMX, False):
            found[_AMX] = (
                f"layer {name!r}: the projections of latent attention (MLA), packed for AMX from a parameter that vLLM "
                "throws away (use --attention-backend CPU_MLA)"
            )
    if not graphs:
        return list(found.values())
    tensors = (*model.parameters(), *model.buffers())
    kept = {_address(tensor) for tensor in tensors} - {0}
    search = _Search(model)
    for name, layer in _named_modules(model):
        for attribute, held in search.of_layer(layer):
            if attribute in HELD and attribute not in found and _address(held) not in kept:
                found[attribute] = _sentence(name, HELD[attribute])
    return list(found.values())


def _named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return cast("Any", model).named_modules()


def _sentence(layer: str, held: KernelTensor) -> str:
    remedy = f"vLLM {held.mended_in} or newer, or {held.instead}" if held.mended_in else held.instead
    return f"layer {layer!r}: {held.what} ({held.source}; use {remedy})"


class _Search:
    """For plain tensors that layers hold, and what processes them; and for what is in `HELD`, whatever it is."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = {id(module) for module in model.modules()}
        """Looked at one by one, and not as parts of each other."""
        self._followed: dict[int, int] = {}
        """Object -> how deep it was followed; layers share much."""

    def of_layer(self, layer: torch.nn.Module) -> Iterator[tuple[str, object]]:
        """Those of a layer that is processed after loading."""
        processors = [found for name in _PROCESSORS if (found := getattr(layer, name, None)) is not None]
        if processors or "W_UV" in vars(layer):
            yield from ((name, value) for name, value in vars(layer).items() if isinstance(value, torch.Tensor))
        for processor in processors:
            yield from self._of_parts(processor, _DEPTH)

    def _of_parts(self, owner: object, depth: int) -> Iterator[tuple[str, object]]:
        for name, value in getattr(owner, "__dict__", dict[str, object]()).items():
            if isinstance(value, torch.Tensor) or (name in HELD and not isinstance(value, _SETTINGS)):
                yield name, value
            elif depth > self._followed.get(id(value), 0) and not self._is_apart(value):
                self._followed[id(value)] = depth
                yield from self._of_parts(value, depth - 1)

    def _is_apart(self, value: object) -> bool:
        return id(value) in self._layers or isinstance(value, type)


def _address(held: object) -> int:
    """Of a tensor; of anything else, one that no tensor has."""
    if not isinstance(held, torch.Tensor):
        return -1
    return 0 if held.is_meta or not held.numel() else held.data_ptr()
