"""Checkpoints by their shapes, and catalogs of them as ranks would gather: nothing of it lies in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workloads import WORKLOADS

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.dtypes import item_size
from checkpoint_engine.planning.buckets import align_up
from checkpoint_engine.source.filling import SEGMENT_TARGET

__all__ = ["MODELS", "Shape", "catalog_of"]

_BLOCK = 128
_SMALLEST_SEGMENT = 1 << 30
_SEGMENTS = 16


class Shape(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * item_size(self.dtype)


@dataclass(frozen=True)
class _Mixture:
    """A mixture of experts, as its configuration gives it."""

    layers: int
    dense: int
    """Layers at the start that have no experts."""
    hidden: int
    experts: int
    expert: int
    """Width of an expert."""
    inner: int
    """Width of the dense layers."""
    vocabulary: int
    attention: tuple[tuple[str, int, int], ...]
    shared: bool
    fp8: bool

    def shapes(self) -> Iterator[Shape]:
        yield Shape("model.embed_tokens.weight", "bfloat16", (self.vocabulary, self.hidden))
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name, rows, columns in self.attention:
                yield from self._matrix(f"{prefix}self_attn.{name}", rows, columns)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield Shape(f"{prefix}{norm}.weight", "bfloat16", (self.hidden,))
            if layer < self.dense:
                yield from self._mlp(f"{prefix}mlp.", self.inner)
                continue
            yield Shape(f"{prefix}mlp.gate.weight", "bfloat16", (self.experts, self.hidden))
            if self.shared:
                yield from self._mlp(f"{prefix}mlp.shared_experts.", self.expert)
            for expert in range(self.experts):
                yield from self._mlp(f"{prefix}mlp.experts.{expert}.", self.expert)
        yield Shape("model.norm.weight", "bfloat16", (self.hidden,))
        yield Shape("lm_head.weight", "bfloat16", (self.vocabulary, self.hidden))

    def _mlp(self, prefix: str, width: int) -> Iterator[Shape]:
        yield from self._matrix(f"{prefix}gate_proj", width, self.hidden)
        yield from self._matrix(f"{prefix}up_proj", width, self.hidden)
        yield from self._matrix(f"{prefix}down_proj", self.hidden, width)

    def _matrix(self, name: str, rows: int, columns: int) -> Iterator[Shape]:
        if not self.fp8:
            yield Shape(f"{name}.weight", "bfloat16", (rows, columns))
            return
        yield Shape(f"{name}.weight", "float8_e4m3fn", (rows, columns))
        yield Shape(f"{name}.weight_scale_inv", "float32", (-(-rows // _BLOCK), -(-columns // _BLOCK)))


def _grouped(hidden: int, queries: int, keys: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("q_proj", queries, hidden),
        ("k_proj", keys, hidden),
        ("v_proj", keys, hidden),
        ("o_proj", hidden, queries),
    )


def _latent(hidden: int, heads: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("q_a_proj", 1536, hidden),
        ("q_b_proj", heads * 192, 1536),
        ("kv_a_proj_with_mqa", 576, hidden),
        ("kv_b_proj", heads * 256, 512),
        ("o_proj", hidden, heads * 128),
    )


def _workload(name: str) -> list[Shape]:
    return [Shape(tensor.name, "bfloat16", tensor.shape) for tensor in WORKLOADS[name]()]


_MIXTURES = {
    "glm-4.5-air": _Mixture(46, 1, 4096, 128, 1408, 10944, 151_552, _grouped(4096, 12288, 1024), True, False),
    "qwen3-235b": _Mixture(94, 0, 4096, 128, 1536, 12288, 151_936, _grouped(4096, 8192, 512), False, False),
    "deepseek-v3.1": _Mixture(61, 3, 7168, 256, 2048, 18432, 129_280, _latent(7168, 128), True, True),
    "kimi-k2": _Mixture(61, 1, 7168, 384, 2048, 18432, 163_840, _latent(7168, 64), True, True),
}
MODELS = {
    **{name: lambda name=name: _workload(name) for name in ("moe15b", "moe30b", "dense32b")},
    **{name: lambda mixture=mixture: list(mixture.shapes()) for name, mixture in _MIXTURES.items()},
}
"""Makes the tensors of each."""


def catalog_of(shapes: Sequence[Shape], ranks: int, hosts: int = 1, *, by: str = "count") -> Catalog:
    """Every rank holds a contiguous share, alike in number of tensors (`count`), or in bytes (`bytes`)."""
    shares: list[list[Shape]] = [[] for _ in range(ranks)]
    total, before = sum(shape.nbytes for shape in shapes), 0
    for index, shape in enumerate(shapes):
        part = index // -(-len(shapes) // ranks) if by == "count" else before * ranks // total
        shares[part].append(shape)
        before += shape.nbytes
    per_host = ranks // hosts
    return Catalog(
        "simulated",
        tuple(
            Holding(
                rank,
                f"host{rank // per_host}",
                f"GPU-{rank}",
                tuple(_segments(share)),
                p2p_address=f"host{rank // per_host}:{rank}",
                rdma_device=f"card{rank}",
                generation=1,
            )
            for rank, share in enumerate(shares)
        ),
    )


def _segments(share: Sequence[Shape]) -> Iterator[SegmentEntry]:
    """As many bytes in each as `register_checkpoint` would put there."""
    needed = sum(align_up(shape.nbytes) for shape in share)
    target = min(SEGMENT_TARGET, max(_SMALLEST_SEGMENT, needed // _SEGMENTS))
    entries, offset = list[TensorEntry](), 0
    for shape in share:
        if entries and offset + shape.nbytes > target:
            yield SegmentEntry(offset, tuple(entries))
            entries, offset = [], 0
        entries.append(TensorEntry(shape.name, shape.dtype, shape.shape, offset))
        offset += align_up(shape.nbytes)
    if entries:
        yield SegmentEntry(offset, tuple(entries))
