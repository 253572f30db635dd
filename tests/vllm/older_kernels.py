"""What `mock_kernels.py` mocks in older vLLM.

Before 0.24 it does not think of FP8 where the platform has no capability that is a number; before 0.22 it has no place
for FP8 experts on the CPU, and before 0.20 none for FP8 in blocks either.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

Compute = Callable[..., Any]


def install_blocks(compute: Compute) -> None:
    """FP8 in blocks, by `compute(input, weight, scale, bias)`: weights and scales lie transposed in memory."""
    process = fp8.process_fp8_weight_block_strategy
    fp8.process_fp8_weight_block_strategy = lambda *given: [part.t().contiguous() for part in process(*given)]
    fp8.W8A8BlockFp8LinearOp.apply = lambda self, input, weight, weight_scale, input_scale=None, bias=None: compute(  # noqa: A006
        input, weight.t(), weight_scale.t(), bias
    )


def lift_limits() -> None:
    """Has FP8 not refused, or given to Marlin, for the sake of the CPU's capability."""
    fp8.current_platform = mock.Mock(wraps=fp8.current_platform, has_device_capability=lambda *_, **__: True)
    CompressedTensorsConfig._check_scheme_supported = staticmethod(
        lambda _, error=True, match_exact=False: not match_exact
    )


def install_experts(compute: Compute, prepare: Compute) -> None:
    """FP8 experts, by `compute`; `prepare` is what becomes of their weights."""

    def convert(*, w13: Any, w2: Any, w13_scale: Any, w2_scale: Any, **_: Any) -> tuple[Any, ...]:
        return *prepare(w13, w2), w13_scale, w2_scale

    for module in (oracle, fp8):  # some methods look in the one, some in the other
        module.select_fp8_moe_backend = lambda **_: (oracle.Fp8MoeBackend.TRITON, Experts)
        module.convert_to_fp8_moe_kernel_format = convert
        module.make_fp8_moe_kernel = lambda *, moe_config, moe_quant_config, **_: Experts(
            compute, moe_config, moe_quant_config
        )
    if "is_monolithic" in vars(fp8.Fp8MoEMethod):  # 0.16, which does not ask the kernel
        fp8.Fp8MoEMethod.is_monolithic = True
        fp8.Fp8MoEMethod.apply_monolithic = apply_in_layer


class Experts:
    """Chooses the experts itself."""

    shared_experts = None

    def __init__(self, compute: Compute, moe_config: Any, quant_config: Any) -> None:
        self._compute = compute
        self._scales = SimpleNamespace(
            moe_config=moe_config, w1_scale=quant_config.w1_scale, w2_scale=quant_config.w2_scale
        )

    @staticmethod
    def is_monolithic() -> bool:
        return True

    def apply_monolithic(self, hidden_states: Any, w1: Any, w2: Any, router_logits: Any, **given: Any) -> Any:
        given |= {"hidden_states": hidden_states, "w1": w1, "w2": w2, "router_logits": router_logits}
        return self._compute(self._scales, **given)


def apply_in_layer(self: Any, layer: Any, x: torch.Tensor, router_logits: torch.Tensor) -> Any:
    routing = {name: getattr(layer, name) for name in ("num_expert_group", "topk_group", "e_score_correction_bias")}
    return self.moe_mk.apply_monolithic(x, layer.w13_weight, layer.w2_weight, router_logits, **routing)
