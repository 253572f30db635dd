"""How the SGLang plugin loads a model, which needs no SGLang: any module with `load_weights` will do."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from checkpoint_engine.contract.figures import details_of
from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.link.messages import TensorSlice
from checkpoint_engine.receiver import deliveries as receiver
from checkpoint_engine.receiver.layouts import ReceivedBucket
from checkpoint_engine_sglang import layouts
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.dry_run import LOADER, DryRun, run_dry
from checkpoint_engine_sglang.model_update import ModelUpdate
from checkpoint_engine_sglang.planned_model import ModelLadder
from checkpoint_engine_sglang.sharding import workers_sharing
from checkpoint_engine_sglang.sink import SGLangSink

pytestmark = pytest.mark.pure

Weights = Iterable[tuple[str, torch.Tensor]]


class Model(nn.Module):
    """Loads as SGLang's models do: fused, sharded (this is rank 0 of two), scalars by value, and joined tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.zeros(4, 6))
        self.fused = nn.Parameter(torch.zeros(8, 6))
        self.shard = nn.Parameter(torch.zeros(3, 6))
        self.scale = nn.Parameter(torch.zeros(1))
        self.joined = nn.Parameter(torch.zeros(4))
        self.calls: list[list[str]] = []

    def load_weights(self, weights: Weights) -> None:
        halves: dict[str, torch.Tensor] = {}
        self.calls.append([])
        for name, tensor in weights:
            self.calls[-1].append(name)
            if name == "plain":
                assert tensor.shape == self.plain.shape, "shapes differ"
                self.plain.data.copy_(tensor)
            elif name in ("fused.0", "fused.1"):
                self.fused.data.narrow(0, 4 * int(name[-1]), 4).copy_(tensor)
            elif name == "shard":
                self.shard.data.copy_(tensor.narrow(0, 0, 3))
            elif name == "scale":
                self.scale.data.fill_(tensor.item())
            elif name.startswith("half"):
                halves[name] = tensor
                if len(halves) == 2:
                    self.joined.data.copy_(torch.cat([halves["half.0"], halves["half.1"]]))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"plain": (4, 6), "fused.0": (4, 6), "fused.1": (4, 6), "shard": (6, 6), "scale": (1,)}
    shapes |= {"half.0": (2,), "half.1": (2,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def specs(given: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}


def runner(model: nn.Module, **config: Any) -> Runner:
    return Runner("target", model, SimpleNamespace(hf_config=SimpleNamespace(**config)), torch.device("cpu"))


def dry_run_of(model: nn.Module, given: dict[str, torch.Tensor]) -> DryRun:
    dry_run = run_dry(runner(model), specs(given))
    assert dry_run.obstacle == ""
    return dry_run


def ladder() -> ModelLadder:
    return ModelLadder(LOADER, "target")


def begun(rungs: ModelLadder, model: nn.Module, given: dict[str, torch.Tensor], mode: str = "auto") -> ModelUpdate:
    planned = rungs.model_for(runner(model), specs(given))
    rungs.begin(mode, planned)
    return ModelUpdate(planned, {name: name for name in given}, rungs)


@pytest.mark.thorough
def test_a_dry_run_sees_everything_and_changes_nothing() -> None:
    model, given = Model(), tensors()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dry_run = dry_run_of(model, given)
    assert dry_run.placed == given.keys()
    assert dry_run.missing(runner(model), frozenset()) == ([], [])
    assert dry_run.too_large(specs(given), runner(model), 2) == []
    assert dry_run.recording.joined == dict.fromkeys(("half.0", "half.1"), frozenset({"half.0", "half.1"}))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.thorough
def test_a_dry_run_names_what_does_not_fit() -> None:
    model = Model()
    given = tensors()
    del given["fused.1"], given["plain"]
    given["nonsense"] = torch.ones(1)
    given["shard"] = torch.ones(9, 6)
    dry_run = dry_run_of(model, given)
    assert dry_run.unplaced(specs(given), runner(model)) == {"nonsense"}
    missing, torn = dry_run.missing(runner(model), frozenset())
    assert missing == torn == ["plain (nothing)", "fused (24 of 48 elements, from fused.0)"]
    assert dry_run.too_large(specs(given), runner(model), 2) == ["shard (shape [9, 6], 18 elements taken)"]
    for name, shape in (("plain", (4, 7)), ("fused.0", (1, 6))):
        with pytest.raises(WeightsRejectedError, match=name):
            run_dry(runner(Model()), specs({**tensors(), name: torch.ones(shape)}))


class Sized(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        vars(self).update(sizes)


class ColumnParallelLinear(Sized): ...


class QKVParallelLinear(ColumnParallelLinear): ...


class RowParallelLinear(Sized): ...


class FusedMoE(Sized): ...


class ReplicatedLinear(Sized): ...


COLUMNS = ColumnParallelLinear(output_size=32, output_size_per_partition=8)
UNSHARDED = ColumnParallelLinear(output_size=32, output_size_per_partition=32)
ATTENTION = QKVParallelLinear(output_size=96, output_size_per_partition=24, total_num_kv_heads=2, num_kv_heads=1)
EXPERTS = FusedMoE(moe_tp_size=2, moe_ep_size=4)


@pytest.mark.parametrize(
    ("layer", "tensor", "workers"),
    [
        (COLUMNS, "mlp.up_proj.weight", 4),
        (UNSHARDED, "mlp.up_proj.weight", 1),  # as with data-parallel attention, or dense layers of their own
        (RowParallelLinear(input_size=32, input_size_per_partition=16), "mlp.down_proj.weight", 2),
        (ATTENTION, "self_attn.q_proj.weight", 4),
        (ATTENTION, "self_attn.k_proj.weight", 2),  # two workers hold the same head
        (ATTENTION, "self_attn.v_proj.bias", 2),
        (ATTENTION, "self_attn.qkv_proj.weight", 4),
        (EXPERTS, "mlp.experts.7.up_proj.weight", 2),
        (EXPERTS, "mlp.experts.gate_up_proj", 8),
        (ReplicatedLinear(output_size=32), "mlp.gate.weight", 8),
        (ColumnParallelLinear(output_size=7, output_size_per_partition=4), "x.weight", 8),
        (nn.LayerNorm(4), "norm.weight", 8),
    ],
)
def test_how_many_workers_share_a_tensor(layer: nn.Module, tensor: str, workers: int) -> None:
    assert workers_sharing(layer, tensor, 8) == workers


class VocabParallelEmbedding(nn.Module):
    """Rank 1 of two, which has the shorter part of 7 rows: its loader knows how many there are in all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2))


class Unequal(nn.Module):
    """An embedding, and keys of which two of four workers hold the same half."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding()
        self.attention = QKVParallelLinear(total_num_kv_heads=2, num_kv_heads=1)
        self.attention.weight = nn.Parameter(torch.zeros(3, 2))

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name == "embedding":
                self.embedding.weight.data[:3].copy_(tensor[4:])
                self.embedding.weight.data[3:].fill_(0)
            else:
                self.attention.weight.data.copy_(tensor[:3])


@pytest.mark.parametrize(("rows", "refused"), [(6, []), (7, ["k_proj.weight (shape [7, 2], 6 elements taken)"])])
def test_too_large_is_what_workers_leave_out_and_not_what_several_of_them_hold(rows: int, refused: list[str]) -> None:
    given = specs({"embedding": torch.ones(7, 2), "k_proj.weight": torch.ones(rows, 2)})
    model = runner(Unequal())
    assert run_dry(model, given).too_large(given, model, 4) == refused


@pytest.mark.thorough
def test_tensors_that_checkpoints_may_have_for_nothing() -> None:
    dry_run = dry_run_of(Model(), tensors())
    spare = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
        "model.layers.2.x.weight",
        "mtp.fc.weight",
    ]
    needed = ["model.layers.1.x.weight", "other.weight"]
    given = specs(dict.fromkeys([*spare, *needed], torch.ones(1)))
    model = runner(Model(), num_hidden_layers=2, tie_word_embeddings=True)
    assert dry_run.unplaced(given, model) == set(needed)
    assert "lm_head.weight" in dry_run.unplaced(given, runner(Model(), tie_word_embeddings=False))


@pytest.mark.thorough
def test_a_loader_that_cannot_be_tried_is_let_through_and_its_model_stays_whole() -> None:
    class Reads(Model):
        def load_weights(self, weights: Weights) -> None:
            for _, tensor in weights:
                if tensor.sum() > 0:
                    raise AssertionError

    class Replaces(Model):
        def load_weights(self, weights: Weights) -> None:
            for _, tensor in weights:
                self.plain.data = tensor
                self.fused = nn.Parameter(tensor, requires_grad=False)

    for kind in (Reads, Replaces):
        model = kind()
        parameters = dict(model.named_parameters())
        dry_run = run_dry(runner(model), specs({"plain": torch.ones(4, 6)}))
        assert "of the target model does not tell where tensors go" in dry_run.obstacle
        assert not dry_run.placed
        assert dict(model.named_parameters()).keys() == parameters.keys()
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert not parameter.is_meta


@pytest.mark.thorough
def test_tensors_that_are_joined_reach_the_loader_together_whatever_the_buckets() -> None:
    model, given = Model(), tensors()
    load = begun(ladder(), model, given, "loader")
    model.calls.clear()
    for name, tensor in given.items():
        passing = tensor.clone()
        load.take([(name, passing), ("of another model", torch.ones(1))])
        passing.zero_()  # the bucket's memory is used again
    assert ["half.0", "half.1"] in [sorted(call) for call in model.calls]
    assert torch.equal(model.joined.data, torch.cat([given["half.0"], given["half.1"]]))
    assert torch.equal(model.shard.data, given["shard"][:3])
    assert model.scale.item() == given["scale"].item()


class Transposing:
    """Processes as SGLang's FP8 methods do: puts other parameters in place of those that the loader knows."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if fault:
            raise RuntimeError(fault[0])
        assert layer.scale.latched is False
        layer.weight = nn.Parameter((layer.weight.data * layer.scale.max()).t(), requires_grad=False)
        layer.scale = nn.Parameter(layer.scale.max(), requires_grad=False)
        layer.scale.latched = True
        layer.rows = layer.weight.data.sum(dim=0)
        layer.loaded = layer.is_open
        layer.is_open = False


fault: list[str] = []


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.given: list[str] = []
        self.layer.quant_method = Transposing()
        self.layer.is_open = True
        self.layer.weight = nn.Parameter(torch.empty(4, 6), requires_grad=False)
        self.layer.scale = nn.Parameter(torch.full((2,), 2.0), requires_grad=False)
        self.layer.scale.latched = False
        self.norm = nn.Parameter(torch.zeros(3), requires_grad=False)
        layouts.remember(self)

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if not tensor.is_meta:
                self.given.append(name)
            if name == "norm":
                self.norm.data.copy_(tensor)
            elif name == "weight":
                self.layer.weight.data.copy_(tensor)
            elif name.startswith("scale"):
                self.layer.scale.data[int(name[-1])].copy_(tensor)


QUANTISED_SHAPES = {"norm": (3,), "scale.0": (), "scale.1": (), "weight": (4, 6)}


def loaded_quantised(seed: int, without: str = "") -> tuple[Quantised, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    given = {name: torch.rand(shape, generator=generator) - 0.5 for name, shape in QUANTISED_SHAPES.items()}
    given.pop(without, None)
    model = Quantised()
    model.load_weights(given.items())
    model.layer.quant_method.process_weights_after_loading(model.layer)
    model.given.clear()
    return model, given


def holds(model: Quantised) -> dict[str, Any]:
    layer = model.layer
    return {
        **{name: (tuple(tensor.shape), tensor.tolist()) for name, tensor in model.named_parameters()},
        "rows": layer.rows.tolist(),
        "switches": (layer.is_open, layer.loaded, layer.scale.latched),
    }


def test_once_the_plan_is_trusted_only_what_it_copies_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rungs = Model(), ladder()
    given = {name: tensor for name, tensor in tensors().items() if name in ("plain", "shard")}
    memory = torch.cat([tensor.flatten().view(torch.uint8) for tensor in given.values()])
    place = {"plain": 0, "shard": given["plain"].nbytes}
    bucket = ReceivedBucket([TensorSlice(name, "float32", tuple(given[name].shape), at) for name, at in place.items()])
    views = Mock(wraps=receiver._tensors_in)
    monkeypatch.setattr(receiver, "_tensors_in", views)
    asked = []
    for _ in range(4):
        for parameter in model.parameters():
            parameter.data.zero_()
        load = begun(rungs, model, given)
        asked.append(load.wanted(list(place.items())))
        load.begin()
        load.take(receiver.view_bucket(memory, bucket, 0))
        load.finish()
        assert torch.equal(model.plain, given["plain"])
        assert torch.equal(model.shard, given["shard"][:3])
    assert asked == [None, None, ((0, 24 * 4 + 18 * 4),), ((0, 24 * 4 + 18 * 4),)]
    assert views.call_count == 2, "once the copies are worked out, no tensor is looked at"


def test_a_processed_layer_takes_weights_again_at_its_old_address() -> None:
    model, a = loaded_quantised(1)
    other, b = loaded_quantised(2)
    places = [tensor.data_ptr() for tensor in (model.layer.weight, model.layer.scale, model.layer.rows)]
    rungs, ways = ladder(), []
    for given, fresh in ((b, other), (a, loaded_quantised(1)[0]), (b, other), (a, loaded_quantised(1)[0])):
        given["of another worker"] = torch.ones(1)
        load = begun(rungs, model, given)
        for name, tensor in given.items():
            load.take([(name, tensor)])
        load.finish()
        ways.append(load.figures.reload)
        assert holds(model) == holds(fresh)
        assert model.given == ([] if ways[-1] == "plan" else list(given))
        model.given.clear()
    assert ways == ["proof", "plan", "plan", "plan"]
    assert places == [tensor.data_ptr() for tensor in (model.layer.weight, model.layer.scale, model.layer.rows)]


def test_a_plan_outlives_an_update_that_has_done_nothing_but_copies_into_parameters_that_stay() -> None:
    model, given = loaded_quantised(1)
    rungs = ladder()
    assert not begun(rungs, model, given).only_copied, "the first update goes by the loader"
    for _ in range(2):
        load = begun(rungs, model, given)
        load.take(list(given.items()))
        load.finish()
    load = begun(rungs, model, given)
    load.take([("norm", given["norm"])])
    assert load.only_copied
    load.take([("scale.0", given["scale.0"])])
    assert not load.only_copied, "a layer is open that SGLang processes"
    load.abort()


def test_what_a_checkpoint_lacks_goes_back_to_what_it_was_at_first() -> None:
    model, _ = loaded_quantised(1)
    fresh, b = loaded_quantised(2, without="scale.1")
    assert loaded_quantised(2)[0].layer.scale != fresh.layer.scale
    load = begun(ladder(), model, b, "loader")
    load.take(list(b.items()))
    load.finish()
    assert holds(model) == holds(fresh)


def test_a_layer_that_cannot_be_processed_or_completed_keeps_its_old_weights() -> None:
    model, _ = loaded_quantised(1)
    _, b = loaded_quantised(2)
    before = holds(model)
    for broken in (True, False):
        load = begun(ladder(), model, b)
        fault[:] = ["no kernel"] if broken else []
        try:
            if broken:
                with pytest.raises(WorkerError, match=r"layer layer of the target model: .*no kernel"):
                    load.take(list(b.items()))
            else:
                load.take([("weight", b["weight"])])
                assert model.layer.weight.shape == (4, 6)
        finally:
            fault.clear()
        load.abort()
        assert {key: value for key, value in holds(model).items() if key != "norm"} == {
            key: value for key, value in before.items() if key != "norm"
        }


class Deriving(Model):
    """Derives something when its loader ends, as MiniCPM3's does; and keeps a list of its parameters, as others do."""

    def __init__(self) -> None:
        super().__init__()
        self.turned: torch.Tensor | None = None
        self.known: dict[str, nn.Parameter] | None = None

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.known = dict(self.named_parameters())
        self.turned = self.plain.data.t().contiguous()


def update(sink: SGLangSink, given: dict[str, torch.Tensor], reload: str = "auto") -> dict[str, Any]:
    sink.begin(Update("id", "checkpoint", "version", specs(given), reload))
    for name in sorted(given, reverse=True):
        sink.load([(name, given[name].clone())])
    return details_of(sink.finish())


@pytest.mark.thorough
def test_what_a_loader_derives_itself_stays_right_and_where_it_was() -> None:
    given = tensors()
    others = {name: tensor + 1 for name, tensor in given.items()}
    model = Deriving()
    model.load_weights(given.items())
    assert dry_run_of(Model(), given).derived == ()
    assert dry_run_of(model, given).derived == ("turned",)
    place = model.turned
    sink = SGLangSink([runner(model)], 2)
    for weights in (others, given, others):
        assert update(sink, weights)["reload"] == "loader"
        assert model.turned is place
        assert torch.equal(place, weights["plain"].t())
    with pytest.raises(WeightsRejectedError, match="derives turned from its weights itself, which no plan does"):
        update(sink, given, "plan")
    equal, other = (update(sink.verifier(), weights) for weights in (others, given))
    assert (equal["different"], equal["not_compared"].count("derives turned itself")) == ("", 1)
    assert "plain" in other["different"]
    assert torch.equal(place, others["plain"].t())
    assert model.turned is place


class PlusOne(nn.Module):
    """Keeps its weight with 1 added, for kernels that want it so, as SGLang's GemmaRMSNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("plus_one", torch.ones(4), persistent=False)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = PlusOne()
        self.other = nn.Parameter(torch.zeros(2))

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
            if name == "norm.weight":
                self.norm.plus_one.copy_(self.norm.weight.data).add_(1.0)


def test_what_is_derived_from_a_weight_follows_it_in_every_update_and_is_compared() -> None:
    model = Normed()
    a = {"norm.weight": torch.rand(4), "other": torch.rand(2)}
    b = {name: tensor * 2 for name, tensor in a.items()}
    sink = SGLangSink([runner(model)], 1)
    for given in (b, a, b, a):
        details = update(sink, given)
        assert torch.equal(model.norm.plus_one, given["norm.weight"] + 1)
    assert (details["reload"], details["plan_bytes"]) == ("plan", 8)
    assert "norm.plus_one: computed from norm.weight" in details["loader_reason"]
    figures = update(sink.verifier(), a, "verify")
    assert (figures["different"], figures["not_compared"], figures["compared_tensors"]) == ("", "", 3)
    model.norm.plus_one[1] = 7
    assert update(sink.verifier(), a, "verify")["different"] == "norm.plus_one"
    assert "norm.weight" in update(sink.verifier(), b, "verify")["different"]


class Biased(Quantised):
    """A quantised layer with a bias, and a layer that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.bias = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.norm_bias = nn.Parameter(torch.zeros(3), requires_grad=False)
        layouts.remember(self)


def test_a_quantised_layer_may_lack_scales_that_have_a_value_of_their_own_and_no_bias() -> None:
    model = Biased()
    given = {name: torch.rand(QUANTISED_SHAPES[name]) for name in ("norm", "weight")}
    missing, torn = dry_run_of(model, given).missing(runner(model), frozenset())
    assert missing == ["norm_bias (nothing)", "layer.bias (nothing)"]
    assert "layer.bias (nothing)" in torn


class Tying(nn.Module):
    """Ties its head at the end of each call that brings none, as SGLang's LFM2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(3, 2))
        self.head = nn.Parameter(torch.zeros(3, 2))
        self.norm = nn.Parameter(torch.zeros(2))
        self.calls: list[list[str]] = []

    def load_weights(self, weights: Weights) -> None:
        given: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            given[name] = tensor
            self.get_parameter(name).data.copy_(tensor)
        if not any(tensor.is_meta for tensor in given.values()):
            self.calls.append(list(given))
        if "head" not in given and "embedding" in given:
            self.head.data.copy_(given["embedding"])


class Counting(Tying):
    """Wants everything in each call, as SGLang's Laguna does."""

    def load_weights(self, weights: Weights) -> None:
        given = dict(weights)
        super().load_weights(given.items())
        if len(given) < len(dict(self.named_parameters())):
            raise RuntimeError("not all tensors were loaded")


class ScaledNorm(Tying):
    """Has something besides that only its loader can fill."""

    def load_weights(self, weights: Weights) -> None:
        given = dict(weights)
        if "norm" in given:
            given["norm"] = given["norm"] * 2
        super().load_weights(given.items())


@pytest.mark.parametrize("reload", ["auto", "loader"])
@pytest.mark.parametrize(("kind", "ways"), [(Tying, "plan"), (Counting, "plan"), (ScaledNorm, "loader")])
def test_a_loader_that_must_see_all_tensors_at_once_does(kind: type[Tying], ways: str, reload: str) -> None:
    model, shapes = kind(), {"embedding": (3, 2), "head": (3, 2), "norm": (2,)}
    sink = SGLangSink([runner(model)], 1)
    for number in range(3):
        given = {name: torch.rand(shape) for name, shape in shapes.items()}
        model.calls.clear()
        details = update(sink, given, reload)
        factor = 2 if kind is ScaledNorm else 1
        held = {name: tensor.clone() for name, tensor in model.named_parameters()}
        assert all(torch.equal(held[name], given[name] * (factor if name == "norm" else 1)) for name in given)
        expected = "loader" if reload == "loader" else ("proof", ways, ways)[number] if ways == "plan" else ways
        assert details["reload"] == expected
        assert model.calls == ([] if expected == "plan" else [["norm", "head", "embedding"]])
        figures = update(sink.verifier(), given, "verify")
        assert figures["different"] == ""
    if kind is ScaledNorm:
        assert (
            "takes all tensors or none (in parts, it would fill head otherwise)" in details["loader_reason"]
            or reload == "loader"
        )
        assert "norm (only its loader can place it)" in figures["not_compared"]
        assert figures["unseen_tensors"] == 1


def test_a_call_of_a_loader_that_is_given_up_ends() -> None:
    model, before = Tying(), set(threading.enumerate())
    given = {"embedding": torch.rand(3, 2), "head": torch.rand(3, 2), "norm": torch.rand(2)}
    sink = SGLangSink([runner(model)], 1)
    sink.begin(Update("id", "checkpoint", "version", specs(given), "loader"))
    sink.load([("head", given["head"])])
    assert set(threading.enumerate()) > before
    assert sink.abort() is False
    assert set(threading.enumerate()) == before
    assert update(sink, given)["reload"] == "proof"


def test_what_a_loader_raises_in_the_middle_of_its_only_call_names_the_tensor() -> None:
    model = Tying()
    given = {"embedding": torch.rand(3, 2), "head": torch.rand(3, 2), "norm": torch.rand(2)}
    sink = SGLangSink([runner(model)], 1)
    sink.begin(Update("id", "checkpoint", "version", specs(given), "loader"))
    broken = torch.rand(7, 7)
    sink.load([("norm", given["norm"])])
    with pytest.raises(WorkerError, match="failed at tensor 'head': RuntimeError"):
        sink.load([("head", broken), ("embedding", given["embedding"])])
    assert sink.abort() is False


class Removing(Model):
    """Has no use for a layer once it is loaded, as MiniCPM3."""

    def __init__(self) -> None:
        super().__init__()
        self.needed_once = nn.Linear(2, 2)

    def load_weights(self, weights: Weights) -> None:
        self.needed_once.requires_grad_(False)
        super().load_weights(weights)
        del self.needed_once


def test_a_trial_of_a_loader_that_removes_layers_removes_none() -> None:
    model = Removing()
    assert "it replaces needed_once.weight" in run_dry(runner(model), specs(tensors())).obstacle
    assert isinstance(model.needed_once, nn.Linear)
    given = tensors()
    given["plain"] = torch.ones(5, 5)
    with pytest.raises(WeightsRejectedError, match="plain"):
        run_dry(runner(model), specs(given))
    assert isinstance(model.needed_once, nn.Linear)


def test_a_loader_that_cannot_run_again_is_refused_before_anything_changes() -> None:
    model, given = Removing(), tensors()
    sink = SGLangSink([runner(model)], 2)
    update(sink, given)
    with pytest.raises(WeightsRejectedError, match="needed_once"):
        update(sink, given)
    assert not sink.dirty


class Remembering(Model):
    """Keeps a list of its parameters from its first load on, as SGLang's SDAR does."""

    def load_weights(self, weights: Weights) -> None:
        if not hasattr(self, "_cached_params_dict"):
            self._cached_params_dict = {name: (parameter,) for name, parameter in self.named_parameters()}
        for name, tensor in weights:
            self._cached_params_dict[name][0].data.copy_(tensor)


def test_a_loader_that_remembers_parameters_is_tried_again_on_those_without_data() -> None:
    model = Remembering()
    given = {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}
    model.load_weights(given.items())
    assert run_dry(runner(model), specs(given)).obstacle == ""
    assert model._cached_params_dict["plain"][0] is model.plain


class Noting(Normed):
    """Its loader notes something that another layer may ask for."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.norm.is_loaded = True


@pytest.mark.parametrize(("kind", "second"), [(Normed, "plan"), (Noting, "proof")])
def test_another_engines_proof_is_taken_unless_the_loader_must_run_for_something_else(
    kind: type[Normed], second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_PROOFS", str(tmp_path))
    given = {"norm.weight": torch.rand(4), "other": torch.rand(2)}
    ways = []
    for updates in (1, 3):
        model = kind()
        sink = SGLangSink([runner(model)], 1)
        for _ in range(updates):
            ways.append(update(sink, given)["reload"])
            assert torch.equal(model.norm.plus_one, given["norm.weight"] + 1)
            assert torch.equal(model.other, given["other"])
            assert getattr(model.norm, "is_loaded", False) is (kind is Noting)
    assert ways == ["proof", second, "plan", "plan"]
