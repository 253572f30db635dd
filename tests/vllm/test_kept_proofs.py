"""Proofs that outlive a vLLM: the next one of its kind goes by plan from its first update, and no other does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from checkpoint_engine.sdk import TensorSpec
from checkpoint_engine.sdk.plans import make_plan, record
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.layers import Layers, Way
from checkpoint_engine_vllm.loadplan import LoadPlan
from tests.vllm.test_plans import holds

Engine = Callable[..., dict[str, Any]]


@pytest.fixture
def kept(engine: Engine, tmp_path: Path) -> Iterator[Path]:
    """Where they are kept."""
    engine("keep_proofs", where=tmp_path / "proofs")
    yield tmp_path / "proofs"
    engine("keep_proofs", where="off")


def updated(engine: Engine, checkpoint: Path, recorded: int | None = None) -> str:
    """How an update went, which recorded so many plans."""
    done = engine("update", checkpoint=checkpoint)
    assert done["error"] is None, done
    assert recorded is None or done["recorded"] == recorded
    return done["details"]["reload"]


def test_a_second_process_goes_by_plan_from_its_first_update(
    engine: Engine, fresh_engine: Engine, cold: Engine, checkpoints: Path, kept: Path
) -> None:
    one, other = checkpoints / "moe", checkpoints / "moe-b"
    expected = {each: cold(each.name) for each in (one, other)}
    engine("start", model=one, load_format="dummy")
    assert updated(engine, other, recorded=1) == "proof"
    (file,) = kept.iterdir()
    file.unlink()
    engine("forget")
    assert updated(engine, other) == "proof"
    assert not list(kept.iterdir()), "an update that changes nothing shows nothing of what else would change"
    engine("forget")
    assert updated(engine, one) == "proof"
    assert file.exists()

    fresh_engine("keep_proofs", where=kept)
    fresh_engine("start", model=other, load_format="dummy")  # wherever its checkpoint lies
    for checkpoint in (other, one, other):
        assert updated(fresh_engine, checkpoint, recorded=0) == "plan", "it recorded its plan when it started"
        assert holds(fresh_engine, expected[checkpoint])

    fresh_engine("start", model=one, load_format="dummy", hf_overrides={"rope_theta": 20_000.0})
    assert updated(fresh_engine, other, recorded=1) == "proof", "the same plan and tensors, of another configuration"
    assert len(list(kept.iterdir())) == 2

    file.write_bytes(file.read_bytes()[:-1] + b"?")
    engine("start", model=one, load_format="dummy")
    assert updated(engine, other) == "proof", "the file is damaged"
    assert holds(engine, expected[other])


# -- what a proof is kept under ---------------------------------------------------------------------------------------


class Processed:
    """A method that makes something of weights."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...


class Quick(torch.nn.Linear):
    """Another class of the same layout."""


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def info(module: torch.nn.Module) -> SimpleNamespace:
        return SimpleNamespace(restore_metadata=(dict(module.named_parameters(recurse=False)), {}))

    monkeypatch.setattr("checkpoint_engine_vllm.layers._VERSIONED", ("torch", "tests"))
    monkeypatch.setattr(compat, "layerwise", lambda: SimpleNamespace(info=info))
    monkeypatch.setattr(compat, "is_attention", lambda layer: False)


def model(kind: type[torch.nn.Linear] = torch.nn.Linear, device: str = "cpu") -> torch.nn.Sequential:
    """Two plain layers, and one that is processed."""
    made = torch.nn.Sequential(*(each(3, 3, bias=False, device=device) for each in (torch.nn.Linear, kind, kind)))
    cast("Any", made[2]).quant_method = Processed()
    return made


def layers(kind: type[torch.nn.Linear] = torch.nn.Linear, into: str = "0.weight", **noted: object) -> Layers:
    """What is known of a fresh model, the tensor `a` of which goes to `into`."""
    targets = dict(model(kind, "meta").named_parameters())
    places = {"a": into, "b": "1.weight", "c": "2.weight"}

    def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            targets[places[name]].data.copy_(tensor)

    seen = record(load, targets, {name: TensorSpec(torch.float32, (3, 3)) for name in places})
    plan = LoadPlan(
        "", make_plan(seen, targets), targets, {}, noted={f"0.Linear.{name}": noted[name] for name in noted}
    )
    return Layers(plan, model(kind))


def proved(rebuilt: str = "", left: str = "") -> str:
    """What the proof of such a model is kept under."""
    found = layers()
    assert found.digest == "", "nothing is proved yet"
    found.tried = True
    if rebuilt:
        found.rebuild(found.layers[rebuilt])
    if left:
        found.layers[left].leave_to_loader("computed")
    return found.digest


@pytest.mark.usefixtures("without_vllm")
def test_the_ways_that_were_proved_are_taken_over_and_no_others() -> None:
    assert layers().recall({proved()}.__contains__)
    found = layers()
    assert found.recall({proved(rebuilt="2")}.__contains__)
    assert [layer.name for layer in found.of(Way.REBUILT)] == ["2"]
    assert found.digest == proved(rebuilt="2") != proved()
    assert not layers().recall({proved(rebuilt="1")}.__contains__), "nobody processes that one"
    assert proved(left="1") == ""


SIX = [type(f"Kind{number}", (torch.nn.Linear,), {"__module__": __name__}) for number in range(6)]
"""As many kinds of processed layers as a mixture of experts has."""


def mixture() -> Layers:
    """What is known of a fresh model of them."""
    made, shadow = (torch.nn.Sequential(*(k(3, 3, bias=False, device=d) for k in SIX)) for d in ("cpu", "meta"))
    for layer in made:
        cast("Any", layer).quant_method = Processed()
    targets = dict(shadow.named_parameters())

    def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            targets[name].data.copy_(tensor)

    seen = record(load, targets, {name: TensorSpec(torch.float32, (3, 3)) for name in targets})
    return Layers(LoadPlan("", make_plan(seen, targets), targets, {}), made)


@pytest.mark.usefixtures("without_vllm")
@pytest.mark.parametrize("rebuilt", range(len(SIX)))
def test_whichever_kind_of_six_was_rebuilt_the_proof_is_found(rebuilt: int) -> None:
    proof = mixture()
    proof.tried = True
    proof.rebuild(proof.layers[str(rebuilt)])
    found = mixture()
    assert found.recall({proof.digest}.__contains__)
    assert [layer.name for layer in found.of(Way.REBUILT)] == [str(rebuilt)]


@pytest.mark.usefixtures("without_vllm")
def test_other_layers_other_copies_and_flags_that_no_loader_has_set_are_not_proved() -> None:
    known = {proved()}
    assert not layers(Quick).recall(known.__contains__)
    assert not layers(into="1.weight").recall(known.__contains__)
    found = layers(loaded=True)
    assert not found.recall(known.__contains__)
    cast("Any", found.layers["0"].module).loaded = True
    assert found.recall(known.__contains__)


@pytest.mark.usefixtures("without_vllm")
def test_code_of_no_known_version_is_not_proved_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {proved()}
    monkeypatch.setattr("checkpoint_engine_vllm.layers._VERSIONED", ("torch",))
    assert proved() == ""
    assert not layers().recall(known.__contains__)
