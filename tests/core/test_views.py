"""Trainers' names and layouts: views of what Megatron has, against a conversion that copies everything."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.boxes import TensorBox
from checkpoint_engine.errors import UnsupportedTensorError
from checkpoint_engine.reference.checkpoint import make_checkpoint
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.source.shards import NamedTensors, TensorShard
from checkpoint_engine.source.views import CheckpointBox, checkpoint_views
from tests.core.cluster import Cluster
from tests.core.test_shards import tensors_of

SPECS = {"dense": ModelSpec(extras=False), "experts": ModelSpec(extras=False, experts=4)}
RANKS = 2
PADDING = 12


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    return example("megatron_names")


def as_megatron(tensors: dict[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Whole tensors, fused, stacked and padded by copying."""
    made = {
        "embedding.word_embeddings.weight": padded(tensors["model.embed_tokens.weight"]),
        "output_layer.weight": padded(tensors["lm_head.weight"]),
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
    }
    for layer in range(spec.layers):
        old, new = f"model.layers.{layer}", f"decoder.layers.{layer}"
        q, k, v = (tensors[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv")
        by_group = [
            part.view(spec.kv_heads, -1, spec.hidden)
            for part in (q, k, v)  # (groups, rows of a group, hidden)
        ]
        made |= {
            f"{new}.self_attention.linear_qkv.weight": torch.cat(by_group, 1).reshape(-1, spec.hidden),
            f"{new}.self_attention.linear_qkv.layer_norm_weight": tensors[f"{old}.input_layernorm.weight"],
            f"{new}.self_attention.linear_proj.weight": tensors[f"{old}.self_attn.o_proj.weight"],
            f"{new}.self_attention.q_layernorm.weight": tensors[f"{old}.self_attn.q_norm.weight"],
            f"{new}.self_attention.k_layernorm.weight": tensors[f"{old}.self_attn.k_norm.weight"],
            f"{new}.pre_mlp_layernorm.weight": tensors[f"{old}.post_attention_layernorm.weight"],
        }
        halves = [f"{half}_proj.weight" for half in ("gate", "up")]
        if not spec.experts:
            made[f"{new}.mlp.linear_fc1.weight"] = torch.cat([tensors[f"{old}.mlp.{half}"] for half in halves])
            made[f"{new}.mlp.linear_fc2.weight"] = tensors[f"{old}.mlp.down_proj.weight"]
            continue
        made[f"{new}.mlp.router.weight"] = tensors[f"{old}.mlp.gate.weight"]
        names = [f"{old}.mlp.experts.{expert}" for expert in range(spec.experts)]
        made[f"{new}.mlp.experts.linear_fc1.weight"] = torch.stack(
            [torch.cat([tensors[f"{name}.{half}"] for half in halves]) for name in names]
        )
        made[f"{new}.mlp.experts.linear_fc2.weight"] = torch.stack([tensors[f"{n}.down_proj.weight"] for n in names])
    return made


def padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.full((PADDING, rows.shape[1]), torch.nan, dtype=rows.dtype)])


def of_rank(name: str, whole: torch.Tensor, rank: int, megatron: ModuleType) -> torch.Tensor:
    """A tensor- and expert-parallel rank's own parameter, in memory that others can map."""
    if ".experts." in name:
        part = whole.chunk(RANKS)[rank]
    elif name.endswith("mlp.linear_fc1.weight"):
        part = torch.cat([half.chunk(RANKS)[rank] for half in whole.chunk(2)])
    elif name.endswith(megatron.COLUMN_PARALLEL):
        part = whole.chunk(RANKS)[rank]
    elif name.endswith(megatron.ROW_PARALLEL):
        part = whole.chunk(RANKS, 1)[rank]
    else:
        part = whole
    return part.contiguous().clone().share_memory_()


@pytest.mark.parametrize("way", ["broadcast", "direct"])
@pytest.mark.parametrize("kind", SPECS)
def test_what_megatron_has_is_served_as_it_is(
    kind: str, way: str, clusters: Callable[[int], Cluster], tmp_path: Path, megatron: ModuleType
) -> None:
    spec = SPECS[kind]
    sizes = megatron.MegatronSizes(spec.vocab, spec.heads, spec.kv_heads, spec.head_dim)
    cluster = clusters(RANKS)
    sinks = [ReferenceSink(ReferenceEngine(spec, tp_rank=rank, tp_size=RANKS)) for rank in range(RANKS)]
    cluster.recorders[:] = sinks  # type: ignore[assignment]
    directory = make_checkpoint(tmp_path / "1", spec, seed=1)
    wholes = as_megatron(tensors_of(directory), spec)
    trained = [{name: of_rank(name, whole, rank, megatron) for name, whole in wholes.items()} for rank in range(RANKS)]
    shares: list[NamedTensors] = [
        checkpoint_views({n: megatron.cut(n, t, rank, RANKS, rank, RANKS) for n, t in own.items()}, sizes.layout)
        for rank, own in enumerate(trained)
    ]
    for seed in (1, 2, 3):
        directory = make_checkpoint(tmp_path / str(seed), spec, seed=seed)
        for name, whole in as_megatron(tensors_of(directory), spec).items():
            for rank, own in enumerate(trained):  # an optimiser's step: the same memory, other values
                own[name].copy_(of_rank(name, whole, rank, megatron))
        cluster.publish(shares, f"v{seed}", way, in_place=True)
        for rank, sink in enumerate(sinks):
            assert sink.engine.compare(ReferenceEngine.cold_start(directory, tp_rank=rank, tp_size=RANKS)).equal
    held = [
        segment.kind for holding in cluster.servers[0].catalog("published").holdings for segment in holding.segments
    ]
    assert set(held) == {"device"}  # nothing was copied


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_layout_of_any_parts_is_what_a_copy_gives(data: st.DataObject) -> None:
    stacked, rows, columns = (data.draw(st.integers(1, 5)) for _ in range(3))
    whole = torch.arange(stacked * rows * columns).view(stacked, rows, columns)
    turned = data.draw(st.booleans())
    edge = data.draw(st.integers(0, rows))

    def layout(name: str, shape: tuple[int, ...]) -> list[CheckpointBox]:
        assert (name, shape) == ("fused", tuple(whole.shape))
        found: list[CheckpointBox] = []
        for number in range(stacked):
            for begin, end, at in ((0, edge, rows - edge), (edge, rows, 0)):  # the halves change places
                size, offsets = (1, end - begin, columns), (0, at) if turned else (at, 0)
                target = (columns, rows) if turned else (rows, columns)
                dims = (2, 1) if turned else (1, 2)
                found.append(CheckpointBox(f"w{number}", target, offsets, (number, begin, 0), size, dims))
        return found

    cuts = [sorted(data.draw(st.sets(st.integers(0, size))) | {0, size}) for size in whole.shape]
    boxes = [
        TensorBox((a, b, c), (aa - a, bb - b, cc - c))
        for a, aa in zip(cuts[0], cuts[0][1:], strict=False)
        for b, bb in zip(cuts[1], cuts[1][1:], strict=False)
        for c, cc in zip(cuts[2], cuts[2][1:], strict=False)
    ]
    given_ = [TensorShard(whole[box.slices], whole.shape, box.begin) for box in boxes]
    made = {f"w{n}": torch.full((columns, rows) if turned else (rows, columns), -1) for n in range(stacked)}
    for name, shards in checkpoint_views({"fused": given_}, layout).items():
        for shard in shards:
            assert shard.tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert tuple(shard.shape) == tuple(made[name].shape)
            made[name][TensorBox(tuple(shard.offsets), tuple(shard.tensor.shape)).slices] = shard.tensor
    for number in range(stacked):
        moved = torch.cat([whole[number, edge:], whole[number, :edge]])
        assert torch.equal(made[f"w{number}"], moved.T if turned else moved)


def test_what_a_layout_does_not_know_keeps_its_name_and_nothing_is_forgotten_of_it() -> None:
    tensors = {"a": torch.ones(3, 2, requires_grad=True), "empty": torch.ones(0, 4), "scalar": torch.tensor(3)}
    views = checkpoint_views(tensors, lambda *_: None)
    assert {name: [tuple(shard.tensor.shape) for shard in shards] for name, shards in views.items()} == {
        "a": [(3, 2)],
        "empty": [(0, 4)],
        "scalar": [()],
    }
    assert not views["a"][0].tensor.requires_grad
    assert checkpoint_views(tensors, lambda *_: []) == {}


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (CheckpointBox("w", (4, 2), (0, 0), (1, 0), (4, 2)), "the box leaves the trainer's tensor"),
        (CheckpointBox("w", (3, 2), (0, 0), (0, 0), (4, 2)), "the box leaves the checkpoint's tensor"),
        (CheckpointBox("w", (2,), (0,), (0, 0), (4, 2), dims=(1,)), "of dimensions that are left out"),
        (CheckpointBox("w", (4, 2), (0, 0), (0, 0), (4, 2), dims=(0, 0)), "no such dimensions"),
        (CheckpointBox("w", (4, 2), (0,), (0, 0), (4, 2)), "numbers of dimensions differ"),
    ],
)
def test_a_box_that_is_not_there_is_named(box: CheckpointBox, message: str) -> None:
    with pytest.raises(UnsupportedTensorError, match=f"CheckpointBox.*from 'fused' of shape .4, 2.: .*{message}"):
        checkpoint_views({"fused": torch.ones(4, 2)}, lambda *_: [box])
