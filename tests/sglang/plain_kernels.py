"""Test-only: plain torch in place of CUDA's FP8 kernels, so that SGLang runs FP8 models on any CPU as it does on a GPU.

SGLang refuses FP8 on CPUs without AMX. Here it is told that it may, and computes with the weights that its own
processing for CUDA leaves: transposed, one scale a channel, requantised to packed powers of two for DeepGEMM. What is
replaced is the arithmetic. The processing is SGLang's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from typing import Any

import torch

BLOCK = [128, 128]
FP8_MAX = 448.0


def install() -> None:
    """A plugin of SGLang."""
    fp8: Any = importlib.import_module("sglang.srt.layers.quantization.fp8")
    utils: Any = importlib.import_module("sglang.srt.layers.quantization.fp8_utils")
    compressed: Any = importlib.import_module("sglang.srt.layers.quantization.compressed_tensors.compressed_tensors")
    scheme: Any = importlib.import_module(
        "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8"
    )
    compressed.CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: True
    wrapper: Any = importlib.import_module("sglang.srt.layers.deep_gemm_wrapper")
    fp8._is_cpu = False
    fp8.cutlass_fp8_supported = lambda: True
    fp8.get_device_capability = lambda *_: (9, 0)
    fp8.apply_fp8_linear = scheme.apply_fp8_linear = scaled_linear
    fp8.per_token_group_quant_fp8 = quantise_rows
    fp8.scaled_fp8_quant = quantise
    utils.deepgemm_w8a8_block_fp8_linear_with_fallback = block_linear
    fp8.deepgemm_w8a8_block_fp8_linear_with_fallback = block_linear
    fp8.dispatch_w8a8_block_fp8_linear = lambda **_: block_linear
    fp8.Fp8MoEMethod.is_deepgemm_moe_runner_backend_enabled = staticmethod(lambda *_, **__: True)
    fp8.Fp8MoEMethod.create_moe_runner = lambda *_, **__: None
    fp8.Fp8MoEMethod.apply = experts
    if "only supported with DeepEPMoE" in inspect.getsource(fp8):  # before 0.5.17: else experts are not requantised
        experts_of_one: Any = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")
        experts_of_many: Any = importlib.import_module("sglang.srt.layers.moe.ep_moe.layer")
        experts_of_many.DeepEPMoE = experts_of_one.FusedMoE
    wrapper.ENABLE_JIT_DEEPGEMM = wrapper.DEEPGEMM_SCALE_UE8M0 = True
    wrapper.update_deep_gemm_config = lambda *_, **__: None
    utils.transform_scale_ue8m0 = packed
    stand_in: Any = types.ModuleType("deep_gemm")
    stand_in.utils = types.ModuleType("deep_gemm.utils")
    stand_in.utils.align = lambda size, step: -(-size // step) * step
    stand_in.utils.get_tma_aligned_size = lambda size, width: stand_in.utils.align(size, 16 // width)
    stand_in.utils.layout = types.ModuleType("deep_gemm.utils.layout")
    stand_in.utils.layout.get_mn_major_tma_aligned_packed_ue8m0_tensor = (
        utils._get_mn_major_tma_aligned_packed_ue8m0_tensor_torch_impl
    )
    modules = (stand_in, stand_in.utils, stand_in.utils.layout)
    sys.modules.update({module.__name__: module for module in modules})
    if importlib.util.find_spec("sglang.srt.layers.quantization.mxfp8_input"):  # as new as 0.5.23
        importlib.import_module("plain_small_floats").install()
    rotary: Any = importlib.import_module("sglang.srt.layers.rotary_embedding.factory")
    rotary.get_rope_cpu = lambda *args: rotary.get_rope(*args[:-1])  # the device comes last


def scaled_linear(
    input: torch.Tensor,  # noqa: A002 - SGLang's name for it
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """`weight` is (in, out), and there is one scale for all of it, or one a column."""
    full = weight.float() * weight_scale.float().reshape(1, -1)
    return _linear(input, full.t(), bias)


def block_linear(
    input: torch.Tensor,  # noqa: A002 - SGLang's name for it
    weight: torch.Tensor,
    block_size: list[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """`weight` is (out, in), and there is one scale a block: a number, or one of four exponents packed in a word."""
    assert (block_size, input_scale) == (BLOCK, None)
    return _linear(input, dequantised(weight, weight_scale), bias)


def packed(scale: torch.Tensor, mn: int, **_: Any) -> torch.Tensor:
    """Exponents, four to a word, a row of them for each row of the weight."""
    utils: Any = importlib.import_module("sglang.srt.layers.quantization.fp8_utils")
    rows = scale.index_select(-2, torch.arange(mn, device="cpu") // BLOCK[0])
    return utils._get_mn_major_tma_aligned_packed_ue8m0_tensor_torch_impl(rows)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    utils: Any = importlib.import_module("sglang.srt.layers.quantization.fp8_utils")
    if scale.dtype == torch.int32:
        scale = utils._inverse_transform_scale_ue8m0_impl(scale)
    return utils.block_quant_dequant(weight, scale, BLOCK, torch.float32)


def experts(method: Any, layer: Any, dispatched: Any) -> Any:
    dispatcher: Any = importlib.import_module("sglang.srt.layers.moe.token_dispatcher")
    tokens, topk = dispatched.hidden_states, dispatched.topk_output
    names = ("w13_weight_scale_inv", "w2_weight_scale_inv") if method.block_quant else ("", "")
    result = torch.zeros(tokens.shape, dtype=torch.float32)
    for expert in range(layer.w13_weight.shape[0]):
        share = (topk.topk_weights * (topk.topk_ids == expert)).sum(dim=1, keepdim=True)
        first, second = (
            dequantised(weight[expert], getattr(layer, scale)[expert])
            if scale
            else weight[expert].float() * getattr(layer, f"{name}_scale")[expert]
            for weight, scale, name in zip(
                (layer.w13_weight, layer.w2_weight), names, ("w13_weight", "w2_weight"), strict=True
            )
        )
        gate, up = (tokens.float() @ first.t()).chunk(2, dim=1)
        result += share * ((torch.nn.functional.silu(gate) * up) @ second.t())
    return dispatcher.StandardCombineInput(hidden_states=result.to(tokens.dtype))


def quantise_rows(tensor: torch.Tensor, group: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert group == tensor.shape[-1]
    scale = tensor.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
    return (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def quantise(tensor: torch.Tensor, scale: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = tensor.float().abs().max() / FP8_MAX if scale is None else scale
    return (tensor.float() / found).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), found


def _linear(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = given.float() @ weight.t()
    return (result if bias is None else result + bias.float()).to(given.dtype)
