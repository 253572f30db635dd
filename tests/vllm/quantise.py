"""Quantised forms of a tiny checkpoint: what a quantiser would have written, with scales that differ between parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
QUANTISED = re.compile(r"\.((q|k|v|o|gate|up|down|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa)\.weight$")
"""Linear layers; embeddings, norms, routers and output layers stay as they are."""

Parts = dict[str, torch.Tensor]
"""What stands for one weight, by the last part of the name."""


@dataclass(frozen=True)
class Format:
    """How weights are stored, and what config.json says about it."""

    store: Callable[[torch.Tensor], Parts]
    config: Mapping[str, object]


def quantise(tensors: Mapping[str, torch.Tensor], form: Format) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if QUANTISED.search(name):
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


FORMATS: Mapping[str, Format] = {
    "fp8-block": Format(
        _fp8_block,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", *(f"model.layers.{index}.mlp.gate" for index in range(8))],
        },
    ),
    "fp8-tensor": Format(_fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-channel": Format(_fp8_channel, _compressed("float-quantized", *_eight_bits("float"))),
    "int8-channel": Format(_int8_channel, _compressed("int-quantized", *_eight_bits("int"))),
    "int4-packed": Format(
        _int4_packed,
        _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}, None),
    ),
}
