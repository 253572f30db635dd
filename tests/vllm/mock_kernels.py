"""Mocks of CUDA kernels for FP8, in plain torch, for a CPU that has none: import it where a vLLM engine runs.

Only the kernels are mocked. Loading, requantising and reloading are vLLM's own; what vLLM has on the CPU for itself
(int8, int4, attention) is left alone. As on CUDA, each kernel wants weights and scales otherwise than the checkpoint
has them: transposed, permuted, repacked in another dtype. So whoever loads a checkpoint over them is wrong.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum

from checkpoint_engine_vllm import WorkerExtension


def optional(*modules: str) -> Any:
    """The first of those modules that this vLLM has; before 0.22 it lacks some."""
    for name in modules:
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"vllm.model_executor.{name}")
    return None


BLOCKS = "Fp8BlockScaledMMLinearKernel"
linear: Any = optional("kernels.linear", "layers.quantization.kernels.scaled_mm")
scaled_mm: Any = optional("kernels.linear.scaled_mm", "layers.quantization.kernels.scaled_mm")
cpu_moe: Any = optional("layers.fused_moe.experts.cpu_moe")

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
YES = (True, None)


def install() -> None:
    """Puts the mocks before whatever vLLM would choose."""
    linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU].insert(0, ScaledKernel)
    ops.scaled_fp8_quant = scaled_fp8_quant
    if not CompressedTensorsConfig._check_scheme_supported(0, error=False):
        older_kernels().lift_limits()
    if BLOCKS in vars(scaled_mm):
        linear._POSSIBLE_FP8_BLOCK_KERNELS.setdefault(PlatformEnum.CPU, []).insert(0, BlockKernel)
    else:
        older_kernels().install_blocks(apply_blocks)
    if cpu_moe is None:
        older_kernels().install_experts(Experts.apply, prepare_experts)
    else:
        cpu_moe.CPUExpertsFp8 = Experts
        cpu_moe.prepare_fp8_moe_layer_for_cpu = prepare_experts
    if hasattr(linear, "_POSSIBLE_NVFP4_KERNELS"):
        importlib.import_module("mock_small_floats").install()


def older_kernels() -> Any:
    return importlib.import_module("older_kernels")


class BlockKernel(getattr(scaled_mm, BLOCKS, object)):
    """Keeps weights and scales transposed in memory, as CUTLASS and DeepGEMM want scales."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return YES

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if keeps_layout(layer):
            return
        for name in ("weight", "weight_scale_inv"):
            replace_parameter(layer, name, getattr(layer, name).t().contiguous())

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        weight, scale = layer.weight, layer.weight_scale_inv
        if not keeps_layout(layer):
            weight, scale = weight.t(), scale.t()
        return apply_blocks(x, weight, scale, bias)

    def apply_block_scaled_mm(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError


def keeps_layout(layer: torch.nn.Module) -> bool:
    """vLLM reads the weight of this one itself, to derive what latent attention needs."""
    return str(getattr(layer, "prefix", "")).endswith("kv_b_proj")


def apply_blocks(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, without_blocks(weight, scale).to(x.dtype), bias)


def without_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    grown = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
    return weight.float() * grown[..., : weight.shape[-2], : weight.shape[-1]]


class ScaledKernel(scaled_mm.FP8ScaledMMLinearKernel):
    """One scale a tensor or a channel; weights repacked as int32, as Marlin does, and scales in another order.

    Before 0.20 vLLM asks no kernel to repack; it has transposed the weights itself.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return YES

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return YES

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight, scale = layer.weight, layer.weight_scale
        replace_parameter(layer, "weight", weight.contiguous().view(torch.int32))
        replace_parameter(layer, "weight_scale", scale.reshape(-1).flip(0).contiguous())

    def apply_weights(self, layer: Any, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        repacked = layer.weight.dtype == torch.int32
        scales = layer.weight_scale.reshape(-1)
        weight = layer.weight.view(FP8).float() * (scales.flip(0) if repacked else scales)
        rows = x.reshape(-1, x.shape[-1])
        quantised, scale = self.quant_fp8(rows, layer.input_scale)
        # QuantFP8 may pad rows; a scale is one number, or one a row.
        result = (quantised.float() @ weight * scale)[: rows.shape[0]]
        result = result.to(x.dtype).reshape(*x.shape[:-1], -1)
        return result if bias is None else result + bias

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        raise NotImplementedError


def scaled_fp8_quant(
    tensor: torch.Tensor, scale: torch.Tensor | None = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's operator of this name, which quantises weights, for one scale a tensor."""
    if scale is None:
        scale = (tensor.abs().max().float() / FP8_MAX).reshape(1)
    return (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def prepare_experts(w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Up before gate, as FlashInfer wants it, and transposed."""
    gate, up = w13.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1).transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()


class Experts(getattr(cpu_moe, "CPUExpertsFp8", object)):
    """FP8 experts, in blocks or with one scale each."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        del weight_key, activation_key
        return True

    @staticmethod
    def _supports_routing_method(*_: Any) -> bool:
        return True

    def apply(self, **given: Any) -> torch.Tensor | None:
        """Writes into `output`; before 0.32 it returns what it computes, and chooses the experts itself."""
        hidden_states, w1, w2 = given["hidden_states"], given["w1"], given["w2"]
        alone = "router_logits" in given
        shares, chosen = choose(self, given) if alone else (given["topk_weights"], given["topk_ids"])
        up, gate = w1.transpose(1, 2).chunk(2, dim=1)
        gate_and_up = scaled(torch.cat([gate, up], dim=1), self.w1_scale)
        down = scaled(w2.transpose(1, 2), self.w2_scale)
        result = torch.zeros_like(hidden_states, dtype=torch.float32)
        for token, (experts, parts) in enumerate(zip(chosen.tolist(), shares.float(), strict=True)):
            for expert, share in zip(experts, parts, strict=True):
                opened, kept = (gate_and_up[expert] @ hidden_states[token].float()).chunk(2)
                result[token] += share * (down[expert] @ (torch.nn.functional.silu(opened) * kept))
        return result.to(hidden_states.dtype) if alone else given["output"].copy_(result)


def choose(experts: Any, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's own kernel for the CPU does before 0.32."""
    package = "vllm.model_executor.layers.fused_moe"
    vllms: Any = cpu_moe if hasattr(cpu_moe, "select_experts") else importlib.import_module(f"{package}.cpu_fused_moe")
    return vllms.select_experts(
        given["hidden_states"],
        given["router_logits"],
        experts.moe_config.experts_per_token,
        use_grouped_topk=given["num_expert_group"] is not None,
        renormalize=True,
        topk_group=given["topk_group"],
        num_expert_group=given["num_expert_group"],
        e_score_correction_bias=given["e_score_correction_bias"],
    )


def scaled(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weights.float() * scale[:, None, None] if scale.dim() == 1 else without_blocks(weights, scale)


class MockedExtension(WorkerExtension):
    """Ours, for `--worker-extension-cls`: vLLM imports this module before its workers build their model."""


install()
