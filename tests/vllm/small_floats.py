"""Weights in floats of four and eight bits with a scale for each small block, as models are published in them."""

from __future__ import annotations

import torch

Parts = dict[str, torch.Tensor]
"""What stands for one weight, by the last part of the name."""

FP8 = torch.float8_e4m3fn
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_MAX, FP8_MAX = 6.0, 448.0
MX_BLOCK, NV_BLOCK = 32, 16
"""Elements that share a scale: a power of two (OCP's MX formats), or a float of eight bits (NVFP4)."""
BIAS = 127
"""Of the exponents that stand for powers of two."""


def packed(values: torch.Tensor) -> torch.Tensor:
    """The nearest floats of four bits, two to a byte, the first in the lower half."""
    nearest = (values.abs().unsqueeze(-1) - FP4_VALUES).abs().argmin(dim=-1)
    codes = (nearest + 8 * (values < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def _blocks(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements by block, and the largest of each."""
    blocks = weight.reshape(*weight.shape[:-1], -1, size)
    return blocks, blocks.abs().amax(dim=-1)


def _powers(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """Exponents, with their bias, that bring what is largest within the limit."""
    return ((largest / limit).log2().ceil().clamp(-BIAS, BIAS) + BIAS).to(torch.uint8)


def _scale(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.float() - BIAS).unsqueeze(-1)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed elements (…, blocks, 16) and exponents (…, blocks)."""
    blocks, largest = _blocks(weight, MX_BLOCK)
    exponents = _powers(largest, FP4_MAX)
    return packed(blocks / _scale(exponents)), exponents


def mxfp4_experts(weight: torch.Tensor) -> Parts:
    """As DeepSeek-V4 has its experts, one by one."""
    elements, exponents = mxfp4(weight)
    return {"weight": elements.flatten(-2), "weight_scale": exponents.view(torch.float8_e8m0fnu)}


def mxfp4_experts_beside_fp8(weight: torch.Tensor) -> Parts:
    """The same under the names that SGLang's model of DeepSeek-V4 gives them."""
    elements, exponents = mxfp4(weight)
    return {"weight": elements.flatten(-2).view(torch.int8), "weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}


def mxfp8(weight: torch.Tensor) -> Parts:
    """As MiniMax-M3 has it, and ModelOpt's MXFP8."""
    blocks, largest = _blocks(weight, MX_BLOCK)
    exponents = _powers(largest, FP8_MAX)
    return {"weight": (blocks / _scale(exponents)).to(FP8).flatten(-2), "weight_scale": exponents}


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks, largest = _blocks(weight, NV_BLOCK)
    whole = weight.abs().max() / (FP4_MAX * FP8_MAX)
    scales = (largest / FP4_MAX / whole).to(FP8)
    inverse = 1 / (scales.float() * whole).clamp(min=1e-12)
    return packed(blocks * inverse.unsqueeze(-1)).flatten(-2), scales, whole


def nvfp4(weight: torch.Tensor) -> Parts:
    """As ModelOpt writes it: the scale of the whole is multiplied with."""
    elements, scales, whole = _nvfp4(weight)
    return {"weight": elements, "weight_scale": scales, "weight_scale_2": whole, "input_scale": whole * 40}


def nvfp4_compressed(weight: torch.Tensor) -> Parts:
    """As compressed-tensors writes it: the scale of the whole is divided by."""
    elements, scales, whole = _nvfp4(weight)
    return {
        "weight_packed": elements,
        "weight_scale": scales,
        "weight_global_scale": (1 / whole).reshape(1),
        "input_global_scale": (1 / (whole * 40)).reshape(1),
    }
