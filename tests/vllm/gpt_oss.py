"""A tiny gpt-oss as it is published: all experts of a layer in one tensor of MXFP4 blocks, all else in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from small_floats import mxfp4

if TYPE_CHECKING:
    from models import Size

CONFIG: Mapping[str, object] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
    ],
}
_EXPERTS = (".gate_up_proj", ".down_proj")


def layer(prefix: str, size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer, but for its norms; experts as they are before they are stored."""
    for part, heads in (("q", size.heads), ("k", size.key_heads), ("v", size.key_heads)):
        yield f"{prefix}.self_attn.{part}_proj.weight", (heads * size.head, size.hidden)
        yield f"{prefix}.self_attn.{part}_proj.bias", (heads * size.head,)
    yield f"{prefix}.self_attn.o_proj.weight", (size.hidden, size.heads * size.head)
    yield f"{prefix}.self_attn.o_proj.bias", (size.hidden,)
    yield f"{prefix}.self_attn.sinks", (size.heads,)
    yield f"{prefix}.mlp.router.weight", (size.experts, size.hidden)
    yield f"{prefix}.mlp.router.bias", (size.experts,)
    yield f"{prefix}.mlp.experts.gate_up_proj", (size.experts, 2 * size.expert_intermediate, size.hidden)
    yield f"{prefix}.mlp.experts.gate_up_proj_bias", (size.experts, 2 * size.expert_intermediate)
    yield f"{prefix}.mlp.experts.down_proj", (size.experts, size.hidden, size.expert_intermediate)
    yield f"{prefix}.mlp.experts.down_proj_bias", (size.experts, size.hidden)


def store(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as blocks and their exponents."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_EXPERTS):
            found[f"{name}_blocks"], found[f"{name}_scales"] = mxfp4(tensor.float())
        else:
            found[name] = tensor
    return found


def config(size: Size) -> dict[str, object]:
    """What its config.json has besides what all have."""
    return {
        "num_local_experts": size.experts,
        "num_experts_per_tok": 2,
        "intermediate_size": size.expert_intermediate,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
