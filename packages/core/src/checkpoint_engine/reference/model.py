"""The model of the reference engine: its checkpoint, its parameters, and which part of one goes where.

It is shaped like Qwen3: fused projections, column- and row-parallel shards, replicated norms, embeddings that
are sharded over the vocabulary; with experts or without, with tied embeddings or without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import msgspec
import torch

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import SettingError, UnsupportedTensorError

__all__ = ["Layout", "ModelSpec", "Region", "Slot", "checkpoint_tensors", "plan_layout"]

Region = tuple[slice | int | EllipsisType, ...]

_EXTRAS: dict[str, TensorSpec] = {
    "model.rotary_emb.inv_freq": TensorSpec(torch.float32, (7,)),
    "model.steps": TensorSpec(torch.int64, ()),
    "model.scale": TensorSpec(torch.float32, ()),
    "model.odd_bytes": TensorSpec(torch.uint8, (13,)),
    "model.mask": TensorSpec(torch.bool, (5, 3)),
    "model.empty": TensorSpec(torch.float16, (0, 4)),
    "model.half": TensorSpec(torch.float16, (3, 5)),
}
"""Buffers that every worker holds whole: odd sizes, no dimension, no elements, many dtypes."""


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the model. `experts=0` makes it dense."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 500
    experts: int = 0
    tied: bool = False
    extras: bool = True
    dtype: str = "bfloat16"

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Reads a spec from JSON, or from a file that holds JSON.

        Raises:
            SettingError: neither, or a field is unknown or has the wrong type.
        """
        try:
            data = text.encode() if text.lstrip().startswith("{") else Path(text).read_bytes()
            return msgspec.json.decode(data, type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise SettingError(f"{text!r} is no model spec: {error}") from error

    def to_json(self) -> str:
        """What `parse` reads."""
        return msgspec.json.encode(self).decode()


@dataclass(frozen=True)
class Slot:
    """What a worker does with a tensor of the checkpoint: `parameter[into] = tensor[take]`, `parameter[zeros] = 0`."""

    spec: TensorSpec
    parameter: str
    take: Region
    into: Region
    zeros: Region | None = None


@dataclass(frozen=True)
class Layout:
    """All parameters of one worker, and a slot for every tensor of the checkpoint."""

    parameters: dict[str, TensorSpec]
    slots: dict[str, Slot]


def plan_layout(spec: ModelSpec, tp_rank: int, tp_size: int) -> Layout:
    """The parameters of worker `tp_rank` of `tp_size`.

    Raises:
        SettingError: the sizes of the model cannot be divided among so many workers.
    """
    return _Layouter(spec, tp_rank, tp_size).layout()


class _Layouter:
    def __init__(self, spec: ModelSpec, tp_rank: int, tp_size: int) -> None:
        if spec.heads % tp_size or spec.intermediate % tp_size or _indivisible(spec.kv_heads, tp_size):
            raise SettingError(
                f"{spec.heads} heads, {spec.kv_heads} key-value heads and an intermediate size of "
                f"{spec.intermediate} cannot be divided among {tp_size} tensor-parallel workers"
            )
        try:
            self._dtype = torch_dtype(spec.dtype)
        except UnsupportedTensorError as error:
            raise SettingError(str(error)) from error
        self._spec, self._rank, self._size = spec, tp_rank, tp_size
        self._parameters: dict[str, TensorSpec] = {}
        self._slots: dict[str, Slot] = {}

    def layout(self) -> Layout:
        spec = self._spec
        self._vocabulary("model.embed_tokens.weight")
        for layer in range(spec.layers):
            self._attention(f"model.layers.{layer}.self_attn")
            self._replicated(f"model.layers.{layer}.input_layernorm.weight", (spec.hidden,))
            self._replicated(f"model.layers.{layer}.post_attention_layernorm.weight", (spec.hidden,))
            if spec.experts:
                self._experts(f"model.layers.{layer}.mlp")
            else:
                self._dense(f"model.layers.{layer}.mlp")
        self._replicated("model.norm.weight", (spec.hidden,))
        if not spec.tied:
            self._vocabulary("lm_head.weight")
        if spec.extras:
            for name, extra in _EXTRAS.items():
                self._replicated(name, extra.shape, extra.dtype)
        return Layout(self._parameters, self._slots)

    def _replicated(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        self._parameter(name, shape, dtype)
        self._slot(name, shape, name, (...,), (...,))

    def _vocabulary(self, name: str) -> None:
        rows, hidden = self._spec.vocab, self._spec.hidden
        rows_each = -(-rows // self._size)  # the last worker's rows beyond the vocabulary are zeros
        start = min(self._rank * rows_each, rows)
        end = min(start + rows_each, rows)
        self._parameter(name, (rows_each, hidden))
        self._slot(
            name, (rows, hidden), name, (slice(start, end),), (slice(0, end - start),), (slice(end - start, None),)
        )

    def _attention(self, prefix: str) -> None:
        spec = self._spec
        queries = spec.heads * spec.head_dim // self._size
        kv_each = max(1, spec.kv_heads // self._size)
        keys = kv_each * spec.head_dim
        # With fewer key-value heads than workers, neighbours share a head.
        kv_start = self._rank * spec.kv_heads // self._size * spec.head_dim
        fused = f"{prefix}.qkv_proj.weight"
        self._parameter(fused, (queries + 2 * keys, spec.hidden))
        parts = (
            ("q", spec.heads, self._rank * queries, queries, 0),
            ("k", spec.kv_heads, kv_start, keys, queries),
            ("v", spec.kv_heads, kv_start, keys, queries + keys),
        )
        for part, heads, start, rows, at in parts:
            shape = (heads * spec.head_dim, spec.hidden)
            self._slot(
                f"{prefix}.{part}_proj.weight",
                shape,
                fused,
                (slice(start, start + rows),),
                (slice(at, at + rows),),
            )
        self._columns(f"{prefix}.o_proj.weight", (spec.hidden, spec.heads * spec.head_dim))
        self._replicated(f"{prefix}.q_norm.weight", (spec.head_dim,))
        self._replicated(f"{prefix}.k_norm.weight", (spec.head_dim,))

    def _columns(self, name: str, shape: tuple[int, int]) -> None:
        columns = shape[1] // self._size
        self._parameter(name, (shape[0], columns))
        taken = slice(self._rank * columns, (self._rank + 1) * columns)
        self._slot(name, shape, name, (slice(None), taken), (...,))

    def _dense(self, prefix: str) -> None:
        hidden, rows = self._spec.hidden, self._spec.intermediate // self._size
        fused = f"{prefix}.gate_up_proj.weight"
        self._parameter(fused, (2 * rows, hidden))
        for index, part in enumerate(("gate", "up")):
            self._slot(
                f"{prefix}.{part}_proj.weight",
                (self._spec.intermediate, hidden),
                fused,
                (slice(self._rank * rows, (self._rank + 1) * rows),),
                (slice(index * rows, (index + 1) * rows),),
            )
        self._columns(f"{prefix}.down_proj.weight", (hidden, self._spec.intermediate))

    def _experts(self, prefix: str) -> None:
        spec = self._spec
        each = spec.intermediate // self._size
        mine = slice(self._rank * each, (self._rank + 1) * each)
        w13, w2 = f"{prefix}.experts.w13_weight", f"{prefix}.experts.w2_weight"
        self._replicated(f"{prefix}.gate.weight", (spec.experts, spec.hidden))
        self._parameter(w13, (spec.experts, 2 * each, spec.hidden))
        self._parameter(w2, (spec.experts, spec.hidden, each))
        rows, columns = (spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)
        for expert in range(spec.experts):
            name = f"{prefix}.experts.{expert}"
            self._slot(f"{name}.gate_proj.weight", rows, w13, (mine,), (expert, slice(0, each)))
            self._slot(f"{name}.up_proj.weight", rows, w13, (mine,), (expert, slice(each, 2 * each)))
            self._slot(f"{name}.down_proj.weight", columns, w2, (slice(None), mine), (expert,))

    def _parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        self._parameters[name] = TensorSpec(dtype or self._dtype, shape)

    def _slot(
        self, name: str, shape: tuple[int, ...], parameter: str, take: Region, into: Region, zeros: Region | None = None
    ) -> None:
        dtype = self._parameters[parameter].dtype
        self._slots[name] = Slot(TensorSpec(dtype, shape), parameter, take, into, zeros)


def checkpoint_tensors(spec: ModelSpec) -> Iterator[tuple[str, TensorSpec]]:
    """Names, dtypes and shapes of the whole checkpoint, in the order of the model."""
    for name, slot in plan_layout(spec, 0, 1).slots.items():
        yield name, slot.spec


def _indivisible(heads: int, workers: int) -> bool:
    return heads % workers != 0 and workers % heads != 0
