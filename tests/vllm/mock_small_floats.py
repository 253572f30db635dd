"""Mocks of CUDA kernels for NVFP4, MXFP4 and MXFP8, beside those of mock_kernels.py; only of vLLM as new as 0.32.

For linear layers vLLM has emulations of its own, which it does not offer on a CPU; here it does. Experts are computed
in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from small_floats import FP4_VALUES
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe.experts import cpu_moe, mxfp8_emulation_moe, nvfp4_emulation_moe
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import run_nvfp4_emulations
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum


def install() -> None:
    """Puts the mocks where vLLM looks for kernels of the CPU."""
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign] - where scales are interleaved
    offered: Any = linear
    offered._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, []).insert(0, SwizzledKernel)
    offered._POSSIBLE_MXFP8_KERNELS.setdefault(PlatformEnum.CPU, []).insert(0, offered.EmulationMxfp8LinearKernel)
    modules: Any = cpu_moe, nvfp4_emulation_moe, mxfp8_emulation_moe
    modules[0].CPUExpertsMxfp4 = Mxfp4Experts
    modules[0].prepare_mxfp4_moe_layer_for_cpu = transposed
    modules[1].Nvfp4QuantizationEmulationTritonExperts = Nvfp4Experts
    modules[2].Mxfp8EmulationTritonExperts = Mxfp8Experts


class SwizzledKernel(linear.EmulationNvFp4LinearKernel):
    """Scales interleaved as CUTLASS wants them, by vLLM's own code."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        replace_parameter(layer, "weight_scale", swizzle_blockscale(layer.weight_scale.data))

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scales = (layer.weight_scale, layer.weight_global_scale)
        result = run_nvfp4_emulations(rows, layer.input_global_scale_inv, layer.weight, *scales, swizzle=True)
        result = result.reshape(*x.shape[:-1], -1)
        return result if bias is None else result + bias


def transposed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of all experts at once."""
    return tuple(tensor.transpose(1, 2).contiguous() for tensor in tensors)


class PlainExperts:
    """Experts in plain torch; says nothing of how they are stored."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_routing_method(*_: Any) -> bool:
        return True

    def weights(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def activated(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def apply(self, **given: Any) -> None:
        config: Any = self
        hidden_states: torch.Tensor = given["hidden_states"]
        first, second = self.weights(given["w1"], given["w2"])
        biases = [getattr(config.quant_config, name, None) for name in ("w1_bias", "w2_bias")]
        result = torch.zeros_like(hidden_states, dtype=torch.float32)
        for token, (experts, parts) in enumerate(
            zip(given["topk_ids"].tolist(), given["topk_weights"].float(), strict=True)
        ):
            for expert, share in zip(experts, parts, strict=True):
                opened = first[expert] @ hidden_states[token].float() + _bias(biases[0], expert)
                result[token] += share * (second[expert] @ self.activated(opened) + _bias(biases[1], expert))
        given["output"].copy_(result)


def _bias(bias: torch.Tensor | None, expert: int) -> torch.Tensor | float:
    return 0.0 if bias is None else bias[expert].float()


def unpacked(elements: torch.Tensor) -> torch.Tensor:
    """Floats of four bits, from pairs of them."""
    codes = torch.stack((elements & 15, elements >> 4), dim=-1).flatten(-2).long()
    return FP4_VALUES[codes & 7] * (1 - 2 * (codes >> 3))


def scaled(elements: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each block of the last dimension has one scale."""
    return elements * scale.float().repeat_interleave(elements.shape[-1] // scale.shape[-1], dim=-1)


def powers(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


class Mxfp4Experts(PlainExperts, cpu_moe.CPUExpertsMxfp4):  # type: ignore[misc]
    """Transposed weights and scales; gpt-oss has gate and up in turn, and its own activation."""

    def weights(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config: Any = self.quant_config
        pairs = ((w1, config.w1_scale), (w2, config.w2_scale))
        first, second = (
            scaled(unpacked(elements.transpose(1, 2)), powers(scale.transpose(1, 2))) for elements, scale in pairs
        )
        return first, second

    def activated(self, hidden: torch.Tensor) -> torch.Tensor:
        alpha = getattr(self.quant_config, "gemm1_alpha", None)
        if alpha is None:
            return super().activated(hidden)
        gate, up = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(gate * alpha) * (up + 1)


class Nvfp4Experts(PlainExperts, nvfp4_emulation_moe.Nvfp4QuantizationEmulationTritonExperts):  # type: ignore[misc]
    """As the checkpoint has them, but for the scales of the whole."""

    def weights(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config: Any = self.quant_config
        found = []
        for elements, scale, whole in (
            (w1, self.w1_scale_val, config.g1_alphas),
            (w2, self.w2_scale_val, config.g2_alphas),
        ):
            found.append(scaled(unpacked(elements), scale.view(torch.float8_e4m3fn)) * whole.reshape(-1, 1, 1))
        return found[0], found[1]


class Mxfp8Experts(PlainExperts, mxfp8_emulation_moe.Mxfp8EmulationTritonExperts):  # type: ignore[misc]
    """As the checkpoint has them, or in bfloat16 already."""

    def weights(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if w1.element_size() > 1:
            return w1.float(), w2.float()
        return scaled(w1.float(), powers(self.w1_scale_val)), scaled(w2.float(), powers(self.w2_scale_val))
