"""Test-only, beside plain_kernels.py: SGLang processes NVFP4, MXFP4 and MXFP8 as on a GPU that has kernels for them.

What is replaced says which GPU there is, moves tensors to it, or lays them out by code that only runs there. Nothing
here computes; models are compared, not served.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from typing import Any

import torch

_LAYERS = "sglang.srt.layers"


def install() -> None:
    """Of SGLang 0.5.23."""
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    modelopt: Any = importlib.import_module(f"{_LAYERS}.quantization.modelopt_quant")
    modelopt.get_platform = lambda: types.SimpleNamespace(is_blackwell=True, is_sm120=False)
    modelopt.ModelOptNvFp4FusedMoEMethod.create_moe_runner = _remember
    _install_mxfp4()
    _install_mxfp4_beside_fp8()


def _install_mxfp4() -> None:
    """As on Hopper, with OpenAI's kernels: the method holds the weights, and the layer has none."""
    mxfp4: Any = importlib.import_module(f"{_LAYERS}.quantization.mxfp4")
    backends: Any = importlib.import_module(f"{_LAYERS}.moe").MoeRunnerBackend
    mxfp4.get_moe_runner_backend = lambda: backends.TRITON_KERNELS
    mxfp4.Mxfp4MoEMethod.create_moe_runner = _remember
    mxfp4._swizzle_mxfp4 = _swizzled
    mxfp4._mx_block_kwargs = dict
    kernels: Any = types.ModuleType("triton_kernels")
    kernels.matmul = types.ModuleType("triton_kernels.matmul")
    kernels.matmul.FlexCtx, kernels.matmul.PrecisionConfig = FlexCtx, PrecisionConfig
    sys.modules.update({"triton_kernels": kernels, "triton_kernels.matmul": kernels.matmul})


def _install_mxfp4_beside_fp8() -> None:
    """DeepSeek-V4's experts as on Blackwell: a method that is wrapped around that of FP8 experts."""
    fp8: Any = importlib.import_module(f"{_LAYERS}.quantization.fp8")
    wrapper: Any = importlib.import_module(f"{_LAYERS}.quantization.mxfp4_flashinfer_trtllm_moe")
    experts: Any = importlib.import_module(f"{_LAYERS}.moe.fused_moe_triton").FusedMoE
    choose = fp8.Fp8Config.get_quant_method

    def chosen(self: Any, layer: Any, prefix: str) -> Any:
        if self.is_fp4_experts and isinstance(layer, experts):
            return wrapper.Mxfp4FlashinferTrtllmMoEMethod(fp8.Fp8MoEMethod(self), prefix)
        return choose(self, layer, prefix)

    fp8.Fp8Config.get_quant_method = chosen
    fp8.Fp8MoEMethod.is_deepgemm_moe_runner_backend_enabled = _has_eight_bits
    wrapper._maybe_get_cached_w3_w1_permute_indices = wrapper.get_w2_permute_indices_with_cache = _backwards
    wrapper.block_scale_interleave = lambda scale: scale.t().contiguous()


def _has_eight_bits(*method: Any) -> bool:
    """DeepGEMM is for those experts only, as plain_kernels.py has it."""
    return not any(getattr(each, "is_fp4_expert", False) for each in method)


def _backwards(_cache: object, tensor: torch.Tensor, _tile: int, **_: object) -> torch.Tensor:
    return torch.arange(tensor.shape[0] - 1, -1, -1)


def _remember(method: Any, _layer: Any, config: Any) -> None:
    """In place of kernels for experts."""
    method.moe_runner_config = config
    method._moe_runner_backend = importlib.import_module(f"{_LAYERS}.moe").MoeRunnerBackend.CUTLASS


@dataclasses.dataclass
class Storage:
    data: torch.Tensor


@dataclasses.dataclass
class Wrapped:
    """As OpenAI's kernels keep a tensor."""

    storage: Storage


@dataclasses.dataclass
class FlexCtx:
    rhs_data: object = None


@dataclasses.dataclass
class PrecisionConfig:
    b_mx_scale: object = None
    flex_ctx: object = None


def _swizzled(quantised: torch.Tensor, scale: torch.Tensor, _warps: int) -> tuple[Wrapped, None, Wrapped]:
    first, second = (Wrapped(Storage(tensor.data.transpose(-2, -1).contiguous())) for tensor in (quantised, scale))
    return first, None, second
