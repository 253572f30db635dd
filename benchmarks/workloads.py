"""Tensors of well-known models, and how a tensor-parallel engine shards them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

VOCABULARY = 151_936
HEAD_DIM = 128
BLOCK = 128
"""Rows and columns of an FP8 matrix that share a scale."""
ITEM_SIZES = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint; `dim` is the one that tensor parallelism cuts, None if replicated."""

    name: str
    shape: tuple[int, ...]
    dim: int | None
    dtype: str = "bfloat16"

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)

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


@dataclass(frozen=True)
class Mixture:
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
    attention: tuple[tuple[str, int, int, int | None], ...]
    shared: bool
    fp8: bool

    def tensors(self) -> Iterator[Tensor]:
        """All of the checkpoint."""
        yield Tensor("model.embed_tokens.weight", (self.vocabulary, self.hidden), 0)
        for layer in range(self.layers):
            yield from self._layer(layer)
        yield Tensor("model.norm.weight", (self.hidden,), None)
        yield Tensor("lm_head.weight", (self.vocabulary, self.hidden), 0)

    def layers_of(self, nbytes: float) -> int:
        """How many layers there can be in so many bytes; at least one that has experts."""
        left = nbytes - 2 * ITEM_SIZES["bfloat16"] * self.vocabulary * self.hidden
        layers = 0
        while layers < self.layers:
            left -= sum(tensor.nbytes for tensor in self._layer(layers))
            if left < 0 and layers > self.dense:
                break
            layers += 1
        return layers

    def _layer(self, layer: int) -> Iterator[Tensor]:
        prefix = f"model.layers.{layer}."
        for name, rows, columns, dim in self.attention:
            yield from self._matrix(f"{prefix}self_attn.{name}", rows, columns, dim)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"{prefix}{norm}.weight", (self.hidden,), None)
        if layer < self.dense:
            yield from self._mlp(f"{prefix}mlp.", self.inner)
            return
        yield Tensor(f"{prefix}mlp.gate.weight", (self.experts, self.hidden), None)
        if self.shared:
            yield from self._mlp(f"{prefix}mlp.shared_experts.", self.expert)
        for expert in range(self.experts):
            yield from self._mlp(f"{prefix}mlp.experts.{expert}.", self.expert)

    def _mlp(self, prefix: str, width: int) -> Iterator[Tensor]:
        yield from self._matrix(f"{prefix}gate_proj", width, self.hidden, 0)
        yield from self._matrix(f"{prefix}up_proj", width, self.hidden, 0)
        yield from self._matrix(f"{prefix}down_proj", self.hidden, width, 1)

    def _matrix(self, name: str, rows: int, columns: int, dim: int | None) -> Iterator[Tensor]:
        if not self.fp8:
            yield Tensor(f"{name}.weight", (rows, columns), dim)
            return
        yield Tensor(f"{name}.weight", (rows, columns), dim, "float8_e4m3fn")
        yield Tensor(f"{name}.weight_scale_inv", (-(-rows // BLOCK), -(-columns // BLOCK)), dim, "float32")


def _grouped(hidden: int, queries: int, keys: int) -> tuple[tuple[str, int, int, int | None], ...]:
    return (
        ("q_proj", queries, hidden, 0),
        ("k_proj", keys, hidden, 0),
        ("v_proj", keys, hidden, 0),
        ("o_proj", hidden, queries, 1),
    )


def _latent(hidden: int, heads: int) -> tuple[tuple[str, int, int, int | None], ...]:
    return (
        ("q_a_proj", 1536, hidden, None),
        ("q_b_proj", heads * 192, 1536, 0),
        ("kv_a_proj_with_mqa", 576, hidden, None),
        ("kv_b_proj", heads * 256, 512, 0),
        ("o_proj", hidden, heads * 128, 1),
    )


MIXTURES = {
    "glm-4.5-air": Mixture(46, 1, 4096, 128, 1408, 10944, 151_552, _grouped(4096, 12288, 1024), True, False),
    "qwen3-235b": Mixture(94, 0, 4096, 128, 1536, 12288, 151_936, _grouped(4096, 8192, 512), False, False),
    "deepseek-v3.1": Mixture(61, 3, 7168, 256, 2048, 18432, 129_280, _latent(7168, 128), True, True),
    "kimi-k2": Mixture(61, 1, 7168, 384, 2048, 18432, 163_840, _latent(7168, 64), True, True),
    "smoke-fp8": Mixture(4, 1, 512, 8, 256, 1024, 1024, _latent(512, 8), True, True),
}
"""Of GLM-4.5-Air and DeepSeek-V3.1 without the layers that predict further tokens; the last is no model at all."""
WORKLOADS = {
    "moe30b": lambda: _mixture_of_experts(48, 128),
    "moe15b": lambda: _mixture_of_experts(24, 128),  # half of moe30b, for machines with less memory
    "moe30b-tiny": lambda: _tiny_mixture(48, 128),  # as many tensors, 7 MB: for what an update does besides copying
    "dense32b": lambda: _dense(64),
    "moe-small": lambda: _mixture_of_experts(1, 16),
    "smoke": lambda: _mixture_of_experts(1, 16)[:-3],  # 0.2 GB, to see that a benchmark runs at all
    **{name: lambda mixture=mixture: list(mixture.tensors()) for name, mixture in MIXTURES.items()},
}


def tensors_of(workload: str) -> list[Tensor]:
    """Of a workload by its name; `kimi-k2@7` are the first seven layers of that."""
    name, _, layers = workload.partition("@")
    return list(replace(MIXTURES[name], layers=int(layers)).tensors()) if layers else WORKLOADS[name]()


def share_of(tensors: Sequence[Tensor], rank: int, world: int) -> list[tuple[int, Tensor]]:
    """A rank's contiguous share, with the numbers of its tensors; about as many bytes as any other's."""
    total, before = sum(tensor.nbytes for tensor in tensors), 0
    share: list[tuple[int, Tensor]] = []
    for index, tensor in enumerate(tensors):
        if before * world // total == rank:
            share.append((index, tensor))
        before += tensor.nbytes
    return share
