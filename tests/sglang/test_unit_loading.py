"""How the SGLang plugin loads a model, which needs no SGLang: any module with `load_weights` will do."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from checkpoint_engine.engine import receiver
from checkpoint_engine.engine.adapter import TensorSpec, Update
from checkpoint_engine.engine.layouts import Bucket
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.link.messages import TensorSlice
from checkpoint_engine_sglang import layouts
from checkpoint_engine_sglang.adapter import SGLangAdapter
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.load import Load
from checkpoint_engine_sglang.plans import Plans
from checkpoint_engine_sglang.trial import Trial, try_out

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


def trial_of(model: nn.Module, given: dict[str, torch.Tensor]) -> Trial:
    trial = try_out(runner(model), specs(given))
    assert trial is not None
    return trial


def test_a_trial_sees_everything_and_changes_nothing() -> None:
    model, given = Model(), tensors()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trial = trial_of(model, given)
    assert trial.placed == given.keys()
    assert trial.missing(runner(model), frozenset(), quantised=False) == []
    assert trial.too_large(specs(given), 2) == []
    assert trial.recording.joined == dict.fromkeys(("half.0", "half.1"), frozenset({"half.0", "half.1"}))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_trial_names_what_does_not_fit() -> None:
    model = Model()
    given = tensors()
    del given["fused.1"], given["plain"]
    given["nonsense"] = torch.ones(1)
    given["shard"] = torch.ones(9, 6)
    trial = trial_of(model, given)
    assert trial.unplaced(specs(given), runner(model)) == {"nonsense"}
    missing = trial.missing(runner(model), frozenset(), quantised=False)
    assert missing == ["plain (nothing)", "fused (24 of 48 elements, from fused.0)"]
    assert trial.too_large(specs(given), 2) == ["shard (shape [9, 6], 18 elements taken)"]
    for name, shape in (("plain", (4, 7)), ("fused.0", (1, 6))):
        with pytest.raises(WeightsRejectedError, match=name):
            try_out(runner(Model()), specs({**tensors(), name: torch.ones(shape)}))


def test_tensors_that_checkpoints_may_have_for_nothing() -> None:
    trial = trial_of(Model(), tensors())
    spare = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
        "model.layers.2.x.weight",
        "mtp.fc.weight",
    ]
    needed = ["model.layers.1.x.weight", "other.weight"]
    given = specs(dict.fromkeys([*spare, *needed], torch.ones(1)))
    model = runner(Model(), num_hidden_layers=2, tie_word_embeddings=True)
    assert trial.unplaced(given, model) == set(needed)
    assert "lm_head.weight" in trial.unplaced(given, runner(Model(), tie_word_embeddings=False))


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
        assert try_out(runner(model), specs({"plain": torch.ones(4, 6)})) is None
        assert dict(model.named_parameters()).keys() == parameters.keys()
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert not parameter.is_meta


def test_tensors_that_are_joined_reach_the_loader_together_whatever_the_buckets() -> None:
    model, given = Model(), tensors()
    load = Load(Plans().of(runner(model), specs(given)), {name: name for name in given}, planned=False)
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
    model, plans = Model(), Plans()
    given = {name: tensor for name, tensor in tensors().items() if name in ("plain", "shard")}
    memory = torch.cat([tensor.flatten().view(torch.uint8) for tensor in given.values()])
    place = {"plain": 0, "shard": given["plain"].nbytes}
    bucket = Bucket([TensorSlice(name, "float32", tuple(given[name].shape), at) for name, at in place.items()])
    views = Mock(wraps=receiver._tensors_in)
    monkeypatch.setattr(receiver, "_tensors_in", views)
    asked = []
    for _ in range(4):
        for parameter in model.parameters():
            parameter.data.zero_()
        prepared = plans.of(runner(model), specs(given))
        prepared.prepare("auto")
        load = Load(prepared, {name: name for name in given}, planned=True)
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
    plans, ways = Plans(), []
    for given, fresh in ((b, other), (a, loaded_quantised(1)[0]), (b, other), (a, loaded_quantised(1)[0])):
        given["of another worker"] = torch.ones(1)
        known = plans.of(runner(model), specs(given))
        known.prepare("auto")
        load = Load(known, {name: name for name in given}, planned=True)
        for name, tensor in given.items():
            load.take([(name, tensor)])
        load.finish()
        ways.append(load.way)
        assert holds(model) == holds(fresh)
        assert model.given == ([] if load.way == "plan" else list(given))
        model.given.clear()
    assert ways == ["proof", "plan", "plan", "plan"]
    assert places == [tensor.data_ptr() for tensor in (model.layer.weight, model.layer.scale, model.layer.rows)]


def test_what_a_checkpoint_lacks_goes_back_to_what_it_was_at_first() -> None:
    model, _ = loaded_quantised(1)
    fresh, b = loaded_quantised(2, without="scale.1")
    assert loaded_quantised(2)[0].layer.scale != fresh.layer.scale
    load = Load(Plans().of(runner(model), specs(b)), {name: name for name in b}, planned=False)
    load.take(list(b.items()))
    load.finish()
    assert holds(model) == holds(fresh)


def test_a_layer_that_cannot_be_processed_or_completed_keeps_its_old_weights() -> None:
    model, _ = loaded_quantised(1)
    _, b = loaded_quantised(2)
    before = holds(model)
    for broken in (True, False):
        known = Plans().of(runner(model), specs(b))
        known.prepare("auto")
        load = Load(known, {name: name for name in b}, planned=True)
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


def update(adapter: SGLangAdapter, given: dict[str, torch.Tensor], reload: str = "auto") -> dict[str, Any]:
    adapter.begin(Update("id", "checkpoint", "version", specs(given), reload))
    for name in sorted(given, reverse=True):
        adapter.load([(name, given[name].clone())])
    return dict(adapter.finish())


def test_what_a_loader_derives_itself_stays_right_and_where_it_was() -> None:
    given = tensors()
    others = {name: tensor + 1 for name, tensor in given.items()}
    model = Deriving()
    model.load_weights(given.items())
    assert trial_of(Model(), given).derived == ()
    assert trial_of(model, given).derived == ("turned",)
    place = model.turned
    adapter = SGLangAdapter([runner(model)], 2)
    for weights in (others, given, others):
        assert update(adapter, weights)["reload"] == "loader"
        assert model.turned is place
        assert torch.equal(place, weights["plain"].t())
    with pytest.raises(WeightsRejectedError, match="derives turned from its weights itself, which no plan does"):
        update(adapter, given, "plan")
    equal, other = (update(adapter.verifier(), weights) for weights in (others, given))
    assert (equal["different"], equal["not_compared"].count("derives turned itself")) == ("", 1)
    assert "plain" in other["different"]
    assert torch.equal(place, others["plain"].t())
    assert model.turned is place
