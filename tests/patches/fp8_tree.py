"""A source tree of vLLM on a CPU, as far as `fp8_layers.py` needs it.

A CPU has none of vLLM's FP8 kernels. Replaced by plain torch are the operators `scaled_fp8_quant` and
`gptq_marlin_repack`; made up is what vLLM asks of the device: an H100, where block scales are transposed for CUTLASS,
or something older, where Marlin repacks the weights.
"""

from __future__ import annotations

import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

Vllm = Any
"""What `import_tree` found: modules, classes and functions of vLLM by their names, and the switch `marlin`."""


def import_tree(tree: str) -> Vllm:
    """vLLM from a source tree, on a CPU that says it is an H100 (or, for Marlin, something older)."""
    sys.path.insert(0, tree)
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import _custom_ops as ops
    from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    platform = type(current_platform)
    vllm = types.SimpleNamespace(marlin=False, CacheConfig=CacheConfig)
    platform.has_device_capability = classmethod(lambda *_, **__: not vllm.marlin)
    platform.is_device_capability = classmethod(lambda _, c, *__, **___: c in (90, (9, 0)) and not vllm.marlin)
    ops.scaled_fp8_quant = scaled_fp8_quant
    ops.gptq_marlin_repack = gptq_marlin_repack

    from vllm.attention.layer import Attention
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.layers.quantization.utils import fp8_utils, marlin_utils_fp8, w8a8_utils
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    answers = {
        "cutlass_block_fp8_supported": lambda: True,
        "CUTLASS_BLOCK_FP8_SUPPORTED": True,
        "is_deep_gemm_e8m0_used": lambda: False,
        "should_use_deepgemm_for_fp8_linear": lambda *_, **__: False,
        "marlin_make_workspace_new": lambda device, blocks=1: torch.zeros(blocks, dtype=torch.int, device=device),
    }
    for module in (fp8, fp8_utils, w8a8_utils, marlin_utils_fp8):
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, answer)
    if hasattr(fp8, "Fp8OnlineLinearMethod"):  # vLLM 0.15 asks the kernels themselves, and finds none for a CPU
        fp8.select_fp8_moe_backend = lambda *_, **__: triton_experts(fp8)

    vllm.context = set_current_vllm_config(VllmConfig())
    vllm.context.__enter__()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
    parallel_state.initialize_model_parallel(1)
    torch.set_default_dtype(torch.bfloat16)
    vllm.__dict__.update(fp8=fp8, linear=linear, FusedMoE=FusedMoE, Attention=Attention)
    vllm.default_weight_loader, vllm.process_mla = default_weight_loader, mla_processing()
    vllm.transposes = lambda layer: layer.weight_scale_inv.is_contiguous() if hasattr(layer, "weight_scale_inv") else 0
    try:
        from vllm.model_executor.layers.quantization.utils.reloadable import abandon
    except ModuleNotFoundError:
        abandon = None
    vllm.abandon = abandon
    return vllm


def mla_processing() -> Callable[..., None]:
    try:
        from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
    except ImportError:
        from vllm.v1.attention.backends.mla.common import MLACommonImpl
    return MLACommonImpl.process_weights_after_loading


def triton_experts(fp8: Any) -> tuple[Any, type]:
    from vllm.model_executor.layers.fused_moe.fused_moe import TritonExperts

    return fp8.Fp8MoeBackend.TRITON, TritonExperts


def scaled_fp8_quant(
    input: torch.Tensor,  # noqa: A002 - vLLM's own name
    scale: torch.Tensor | None = None,
    *_: object,
    **__: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (input.abs().max().float() / 448).reshape(1) if scale is None else scale
    return (input.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def gptq_marlin_repack(
    b_q_weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int, *_: object, **__: object
) -> torch.Tensor:
    """The shape that Marlin wants, and another order of the elements."""
    del perm
    return b_q_weight.flip(0).reshape(size_k // 16, size_n * 16 * num_bits // 32).contiguous()
