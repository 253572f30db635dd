"""How many workers share a tensor between them, for each kind of SGLang's layers."""

from __future__ import annotations

import re
from typing import Any, cast

import torch

__all__ = ["is_checked_by_loader", "workers_sharing"]

_KEYS_OR_VALUES = re.compile(r"\b[kv]_proj\.")
_ONE_EXPERT = re.compile(r"\bexperts?\.\d+\.")


def is_checked_by_loader(layer: torch.nn.Module) -> bool:
    """Whether a layer's own loader refuses a tensor of another size: workers' parts of a vocabulary differ in size."""
    return "VocabParallelEmbedding" in _kinds(layer)


def workers_sharing(layer: torch.nn.Module, tensor: str, tensor_parallel_size: int) -> int:
    """How many workers each take a part of their own of a tensor that comes into this layer.

    All tensor-parallel ranks where the layer does not tell: one that holds the same as another then counts as well.
    """
    kinds, held = _kinds(layer), cast("Any", layer)
    if "QKVParallelLinear" in kinds and _KEYS_OR_VALUES.search(tensor):
        # More ranks than heads of keys and values: several of them hold the same one.
        return _parts(held, "total_num_kv_heads", "num_kv_heads", tensor_parallel_size)
    if "ColumnParallelLinear" in kinds:
        return _parts(held, "output_size", "output_size_per_partition", tensor_parallel_size)
    if "RowParallelLinear" in kinds:
        return _parts(held, "input_size", "input_size_per_partition", tensor_parallel_size)
    if "FusedMoE" in kinds:
        within = int(getattr(held, "moe_tp_size", tensor_parallel_size))
        # A tensor of one expert goes to the ranks that hold it; one of all experts to all of them.
        return within if _ONE_EXPERT.search(tensor) else within * int(getattr(held, "moe_ep_size", 1))
    return tensor_parallel_size


def _kinds(layer: torch.nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(layer).__mro__}


def _parts(layer: Any, whole: str, part: str, otherwise: int) -> int:  # noqa: ANN401 - SGLang's own object
    total, here = int(getattr(layer, whole, 0)), int(getattr(layer, part, 0))
    return total // here if here and total and total % here == 0 else otherwise
