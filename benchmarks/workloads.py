"""Tensors of well-known models, and how a tensor-parallel engine shards them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

VOCABULARY = 151_936
HEAD_DIM = 128


@dataclass(frozen=True)
class Tensor:
    """A bf16 tensor of the checkpoint; `dim` is the one that tensor parallelism cuts, None if replicated."""

    name: str
    shape: tuple[int, ...]
    dim: int | None

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return 2 * math.prod(self.shape)

    def shard_shape(self, ranks: int) -> tuple[int, ...]:
        """What one of `ranks` workers keeps."""
        return tuple(size // ranks if axis == self.dim else size for axis, size in enumerate(self.shape))


def _attention(prefix: str, hidden: int, queries: int, keys: int) -> list[Tensor]:
    return [
        Tensor(f"{prefix}self_attn.q_proj.weight", (queries, hidden), 0),
        Tensor(f"{prefix}self_attn.k_proj.weight", (keys, hidden), 0),
        Tensor(f"{prefix}self_attn.v_proj.weight", (keys, hidden), 0),
        Tensor(f"{prefix}self_attn.o_proj.weight", (hidden, queries), 1),
        Tensor(f"{prefix}input_layernorm.weight", (hidden,), None),
        Tensor(f"{prefix}post_attention_layernorm.weight", (hidden,), None),
        Tensor(f"{prefix}self_attn.q_norm.weight", (HEAD_DIM,), None),
        Tensor(f"{prefix}self_attn.k_norm.weight", (HEAD_DIM,), None),
    ]


def _mlp(prefix: str, hidden: int, inner: int) -> list[Tensor]:
    return [
        Tensor(f"{prefix}gate_proj.weight", (inner, hidden), 0),
        Tensor(f"{prefix}up_proj.weight", (inner, hidden), 0),
        Tensor(f"{prefix}down_proj.weight", (hidden, inner), 1),
    ]


def _ends(hidden: int) -> list[Tensor]:
    return [
        Tensor("model.embed_tokens.weight", (VOCABULARY, hidden), 0),
        Tensor("model.norm.weight", (hidden,), None),
        Tensor("lm_head.weight", (VOCABULARY, hidden), 0),
    ]


def _mixture_of_experts(layers: int, experts: int) -> list[Tensor]:
    """The shapes of Qwen3-30B-A3B."""
    tensors: list[Tensor] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors += _attention(prefix, 2048, 4096, 512)
        tensors.append(Tensor(f"{prefix}mlp.gate.weight", (experts, 2048), None))
        for expert in range(experts):
            tensors += _mlp(f"{prefix}mlp.experts.{expert}.", 2048, 768)
    return tensors + _ends(2048)


def _tiny_mixture(layers: int, experts: int) -> list[Tensor]:
    """As many tensors with the same names, of a few bytes each: what is left to measure is not copying."""
    whole = _mixture_of_experts(layers, experts)
    return [replace(tensor, shape=tuple(max(2, size // 128) for size in tensor.shape)) for tensor in whole]


def _dense(layers: int) -> list[Tensor]:
    """The shapes of Qwen3-32B."""
    tensors: list[Tensor] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors += _attention(prefix, 5120, 8192, 1024)
        tensors += _mlp(f"{prefix}mlp.", 5120, 25600)
    return tensors + _ends(5120)


WORKLOADS = {
    "moe30b": lambda: _mixture_of_experts(48, 128),
    "moe15b": lambda: _mixture_of_experts(24, 128),  # half of moe30b, for machines with less memory
    "moe30b-tiny": lambda: _tiny_mixture(48, 128),  # as many tensors, 7 MB: for what an update does besides copying
    "dense32b": lambda: _dense(64),
    "moe-small": lambda: _mixture_of_experts(1, 16),
    "smoke": lambda: _mixture_of_experts(1, 16)[:-3],  # 0.2 GB, to see that a benchmark runs at all
}
