"""Quantised forms of a tiny checkpoint: what a quantiser would have written, with scales that differ between parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import small_floats
import torch
from small_floats import FP8, FP8_MAX, Parts

BLOCK = 128
QUANTISED = re.compile(r"\.((q|k|v|o|gate|up|down|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa)\.weight$")
"""Linear layers; embeddings, norms, routers and output layers stay as they are."""
EXPERTS = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Format:
    """How weights are stored, and what config.json says about it."""

    store: Callable[[torch.Tensor], Parts]
    config: Mapping[str, object]
    quantised: re.Pattern[str] = QUANTISED
    """Names of the weights that are stored so."""


def quantise(tensors: Mapping[str, torch.Tensor], form: Format) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if form.quantised.search(name):
            prefix = name.removesuffix("weight")
            result.update({f"{prefix}{part}": stored for part, stored in form.store(tensor.float()).items()})
        else:
            result[name] = tensor
    return result


def with_cache_scales(tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Adds scales for an FP8 cache of keys and values."""
    result = dict(tensors)
    layers = sorted({name.split(".self_attn.")[0] for name in tensors if ".self_attn." in name})
    for index, layer in enumerate(layers):
        for part, base in (("k", 0.02), ("v", 0.01)):
            scale = base * (1 + seed + index / 4)
            result[f"{layer}.self_attn.{part}_proj.{part}_scale"] = torch.tensor(scale, dtype=torch.float32)
    return result


def _to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _fp8_block(weight: torch.Tensor) -> Parts:
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales = torch.empty(rows, columns)
    stored = torch.empty(weight.shape, dtype=FP8)
    for row in range(rows):
        for column in range(columns):
            place = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            scales[row, column] = weight[place].abs().max() / FP8_MAX
            stored[place] = _to_fp8(weight[place], scales[row, column])
    return {"weight": stored, "weight_scale_inv": scales}


def _fp8_tensor(weight: torch.Tensor) -> Parts:
    scale = weight.abs().max() / FP8_MAX
    # Whatever differs between q, k and v: fused layers have to agree on one scale for their input.
    return {"weight": _to_fp8(weight, scale), "weight_scale": scale, "input_scale": scale * 40}


def _fp8_channel(weight: torch.Tensor) -> Parts:
    scale = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
    return {"weight": _to_fp8(weight, scale), "weight_scale": scale}


def _int8_channel(weight: torch.Tensor) -> Parts:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def _int4_packed(weight: torch.Tensor) -> Parts:
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, BLOCK)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    values = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int64).reshape(rows, columns // 8, 8)
    packed = (values << (4 * torch.arange(8))).sum(dim=2)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(2).to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _compressed(form: str, weights: Mapping[str, object], inputs: Mapping[str, object] | None) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    if inputs is not None:
        group["input_activations"] = {"symmetric": True, "dynamic": True, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
    }


def _eight_bits(kind: str) -> tuple[dict[str, object], dict[str, object]]:
    common: dict[str, object] = {"num_bits": 8, "type": kind}
    return {**common, "strategy": "channel"}, {**common, "strategy": "token"}


def _four_bits(dynamic: bool | str) -> dict[str, object]:
    common = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": small_floats.NV_BLOCK}
    return {**common, "dynamic": dynamic}


def _nvfp4(unquantised: list[str]) -> dict[str, object]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": unquantised, "group_size": 16}


def _mxfp8(unquantised: list[str]) -> dict[str, object]:
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, small_floats.MX_BLOCK],
        "ignored_layers": unquantised,
    }


ATTENTION = [f"model.layers.{index}.self_attn.{part}_proj" for index in range(8) for part in "qkvo"]
UNQUANTISED = ["lm_head", *(f"model.layers.{index}.mlp.gate" for index in range(8))]
"""With routers, whose names some engines take for the beginning of `gate_up_proj` in dense models."""

FORMATS: Mapping[str, Format] = {
    "fp8-block": Format(
        _fp8_block,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": UNQUANTISED,
        },
    ),
    "fp8-tensor": Format(_fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-channel": Format(_fp8_channel, _compressed("float-quantized", *_eight_bits("float"))),
    "int8-channel": Format(_int8_channel, _compressed("int-quantized", *_eight_bits("int"))),
    "int4-packed": Format(
        _int4_packed,
        _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}, None),
    ),
    "nvfp4": Format(small_floats.nvfp4, _nvfp4(["lm_head"])),
    "nvfp4-moe": Format(small_floats.nvfp4, _nvfp4(UNQUANTISED)),
    "nvfp4-compressed": Format(
        small_floats.nvfp4_compressed,
        _compressed("nvfp4-pack-quantized", *(_four_bits(dynamic) for dynamic in (False, "local"))),
    ),
    "mxfp8": Format(small_floats.mxfp8, _mxfp8(["lm_head"])),
    "mxfp8-moe": Format(small_floats.mxfp8, _mxfp8(UNQUANTISED)),
    "mxfp4-experts-beside-fp8": Format(
        small_floats.mxfp4_experts_beside_fp8,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "routed_experts_quant_method": "mxfp4",
            "modules_to_not_convert": [*UNQUANTISED, *ATTENTION],
        },
        EXPERTS,
    ),
    "mxfp4-experts": Format(small_floats.mxfp4_experts, {"quant_method": "mxfp4"}, EXPERTS),
}
