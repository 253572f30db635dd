"""Megatron's names and layouts as boxes of a checkpoint of Qwen3's kind; see docs/frameworks.md.

    weights = checkpoint_views(megatron_shards(model_chunk, ...), megatron_layout(config))      # once
    ps.publish(weights, ask, version=f"step-{step}")                                            # after every step

Two things are said apart from each other. `megatron_layout` says what each *whole* tensor of the trainer is in the
checkpoint; it knows nothing of ranks. How a tensor is cut, the trainer says: this rank's part of each whole tensor as
a `TensorShard`, as `cut` does it here for tensor and expert parallelism. Nothing is copied by either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine import CheckpointBox, TensorShard

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
COLUMN_PARALLEL = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight")
ROW_PARALLEL = ("linear_proj.weight", "mlp.linear_fc2.weight")


@dataclass(frozen=True)
class MegatronSizes:
    """What the layouts depend on."""

    vocab: int
    heads: int
    groups: int
    head_dim: int

    def layout(self, name: str, shape: tuple[int, ...]) -> Sequence[CheckpointBox] | None:
        """Which boxes of a checkpoint a whole tensor of the trainer is made of: a `CheckpointLayout`."""
        if name.endswith("_extra_state"):
            return []
        found = LAYER.fullmatch(name)
        prefix, own = (f"model.layers.{found[1]}.", found[2]) if found else ("", name)
        if own == "self_attention.linear_qkv.weight":
            return list(self._fused_attention(f"{prefix}self_attn", shape[1]))
        if own == "mlp.linear_fc1.weight":
            return list(halves(f"{prefix}mlp", shape))
        if own == "mlp.experts.linear_fc1.weight":
            return [box for expert in range(shape[0]) for box in halves(f"{prefix}mlp.experts.{expert}", shape, expert)]
        if own == "mlp.experts.linear_fc2.weight":
            down = f"{prefix}mlp.experts.{{}}.down_proj.weight"
            return [
                CheckpointBox(down.format(e), shape[1:], (0, 0), (e, 0, 0), (1, *shape[1:]), dims=(1, 2))
                for e in range(shape[0])
            ]
        rows = (self.vocab, *shape[1:]) if own in {"embedding.word_embeddings.weight", "output_layer.weight"} else shape
        nowhere = (0,) * len(shape)  # rows that pad the vocabulary are in no box
        return [CheckpointBox(prefix + PLAIN[own], rows, nowhere, nowhere, rows)]

    def _fused_attention(self, prefix: str, hidden: int) -> Iterator[CheckpointBox]:
        """Rows of a fused parameter: for each group of heads its queries, its key, its value."""
        rows = {"q": self.heads // self.groups * self.head_dim, "k": self.head_dim, "v": self.head_dim}
        at = 0
        for group in range(self.groups):
            for part, count in rows.items():
                whole = (self.groups * count, hidden)
                yield CheckpointBox(f"{prefix}.{part}_proj.weight", whole, (group * count, 0), (at, 0), (count, hidden))
                at += count


def halves(prefix: str, shape: tuple[int, ...], expert: int | None = None) -> Iterator[CheckpointBox]:
    """Gate and up projection, one below the other; of one expert of a grouped parameter if it is given."""
    rows, hidden = shape[-2] // 2, shape[-1]
    for number, part in enumerate(("gate", "up")):
        name, whole = f"{prefix}.{part}_proj.weight", (rows, hidden)
        if expert is None:
            yield CheckpointBox(name, whole, (0, 0), (number * rows, 0), whole)
        else:
            yield CheckpointBox(name, whole, (0, 0), (expert, number * rows, 0), (1, *whole), dims=(1, 2))


def cut(
    name: str, local: torch.Tensor, rank: int, ranks: int, expert_rank: int, expert_ranks: int
) -> torch.Tensor | list[TensorShard]:
    """What a rank's parameter is of the whole tensor, as Megatron deals it out.

    Args:
        name: Megatron's.
        local: The parameter of this rank; experts are stacked: (experts of this rank, rows, columns).
        rank: Among the tensor-parallel ranks.
        ranks: How many those are.
        expert_rank: Among the expert-parallel ranks.
        expert_ranks: How many those are.
    """
    if ".experts." in name:
        first = expert_rank * local.shape[0]
        return [TensorShard(local, (local.shape[0] * expert_ranks, *local.shape[1:]), (first, 0, 0))]
    if name.endswith("mlp.linear_fc1.weight"):  # this rank's rows of the gate, then its rows of the other half
        rows = local.shape[0] // 2
        whole = (2 * rows * ranks, local.shape[1])
        at = (rank * rows, (ranks + rank) * rows)
        return [TensorShard(half, whole, (row, 0)) for half, row in zip(local.chunk(2), at, strict=True)]
    if name.endswith(COLUMN_PARALLEL):
        return [TensorShard(local, (local.shape[0] * ranks, *local.shape[1:]), (rank * local.shape[0], 0))]
    if name.endswith(ROW_PARALLEL):
        return [TensorShard(local, (local.shape[0], local.shape[1] * ranks), (0, rank * local.shape[1]))]
    return local
