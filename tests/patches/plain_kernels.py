"""Runs in the environment of an old vLLM: plain torch in place of the FP8 kernels that its CPU build lacks.

To be named to `vllm serve` as `--worker-extension-cls plain_kernels.Extension`, with this directory in PYTHONPATH: vLLM
imports it in its workers before they make a model. Replaced are the arithmetic and what vLLM asks of the device, so
that weights are processed as for an H100: transposed, requantised to one scale. The processing is vLLM's own, patched.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from fp8_tree import scaled_fp8_quant, triton_experts
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import cpu_fused_moe
from vllm.model_executor.layers.quantization import fp8

from checkpoint_engine_vllm import WorkerExtension

BLOCK = 128
FP8_MAX = 448.0
SCALES_ARE_TRANSPOSED = "weight_scale_inv.data.T.contiguous()" in inspect.getsource(fp8)
"""On an H100, before 0.11."""


class Hopper:
    """vLLM's platform, but for what the processing of FP8 weights asks of it."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def has_device_capability(self, *_: object, **__: object) -> bool:
        return True

    def is_device_capability(self, capability: object, *_: object, **__: object) -> bool:
        return capability in (90, (9, 0))


def install() -> None:
    module: Any = fp8
    module.current_platform = Hopper(fp8.current_platform)
    module.cutlass_block_fp8_supported = lambda: True
    module.Fp8LinearMethod.apply = linear
    module.Fp8MoEMethod.apply = experts
    if hasattr(fp8, "init_fp8_linear_kernel"):
        module.init_fp8_linear_kernel = lambda **_: None
    if hasattr(fp8, "select_fp8_moe_backend"):
        module.select_fp8_moe_backend = lambda *_, **__: triton_experts(fp8)
    if hasattr(cpu_fused_moe, "IPEXFusedMOE"):
        cpu_fused_moe.IPEXFusedMOE = UnquantisedExperts
    ops.scaled_fp8_quant = scaled_fp8_quant
    ops.topk_softmax = topk_softmax


def linear(method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """With the layer's weights as its processing has left them."""
    if method.block_quant:
        scale = layer.weight_scale_inv.t() if SCALES_ARE_TRANSPOSED else layer.weight_scale_inv
        return torch.nn.functional.linear(x, without_blocks(layer.weight, scale).to(x.dtype), bias)
    given = x.float() if layer.input_scale is None else rounded(x, layer.input_scale)
    result = (given @ (layer.weight.float() * layer.weight_scale)).to(x.dtype)
    return result if bias is None else result + bias


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def without_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    grown = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return weight.float() * grown[..., : weight.shape[-2], : weight.shape[-1]]


def experts(method: Any, layer: Any, x: torch.Tensor, **given: Any) -> torch.Tensor:
    """From 0.15 on the chosen experts are given; before that they are chosen here."""
    if "topk_ids" in given:
        shares, chosen = given["topk_weights"], given["topk_ids"]
    else:
        shares, chosen = choose(given["router_logits"], given["top_k"], renormalize=given["renormalize"])
    return with_experts(x, shares, chosen, *(expert_weights(method, layer, name) for name in ("w13", "w2")))


def with_experts(
    x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    result = torch.zeros_like(x, dtype=torch.float32)
    for token, (indices, parts) in enumerate(zip(chosen.tolist(), shares.float(), strict=True)):
        for expert, share in zip(indices, parts, strict=True):
            gate, up = (first[expert] @ x[token].float()).chunk(2)
            result[token] += share * (second[expert] @ (torch.nn.functional.silu(gate) * up))
    return result.to(x.dtype)


def expert_weights(method: Any, layer: Any, name: str) -> torch.Tensor:
    weight = getattr(layer, f"{name}_weight")
    if method.block_quant:
        return without_blocks(weight, getattr(layer, f"{name}_weight_scale_inv"))
    return weight.float() * getattr(layer, f"{name}_weight_scale")[:, None, None]


class UnquantisedExperts:
    """In place of those of Intel's extension, which pack a copy of the weights that vLLM cannot reach."""

    def __init__(self, layer: Any) -> None: ...

    def __call__(
        self, layer: Any, x: torch.Tensor, _: bool, top_k: int, logits: torch.Tensor, renormalize: bool, *__: Any
    ) -> torch.Tensor:
        shares, chosen = choose(logits, top_k, renormalize=renormalize)
        return with_experts(x, shares, chosen, layer.w13_weight.float(), layer.w2_weight.float())


def choose(router_logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shares, chosen = torch.softmax(router_logits.float(), dim=-1).topk(top_k, dim=-1)
    return shares / shares.sum(dim=-1, keepdim=True) if renormalize else shares, chosen


def topk_softmax(
    shares: torch.Tensor,
    chosen: torch.Tensor,
    _: torch.Tensor,
    router_logits: torch.Tensor,
    renormalize: bool = False,
) -> None:
    """vLLM's operator of this name, which writes into its arguments."""
    found = choose(router_logits, shares.shape[-1], renormalize=renormalize)
    shares.copy_(found[0])
    chosen.copy_(found[1])


class Extension(WorkerExtension):
    """Ours, under a name that brings the above with it."""


install()
