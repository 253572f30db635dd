"""Which way each update of a model takes, and what leads up, down and aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.errors import WeightsRejectedError, WorkerError
from checkpoint_engine.reload.kept_proofs import KeptProofs
from checkpoint_engine.reload.ladder import Ladder, PlanStage, Rung
from checkpoint_engine.reload.plan import ReloadPlan, make_plan
from checkpoint_engine.reload.recorder import record

pytestmark = pytest.mark.pure


class TwoLayers:
    """A model of two layers, of which one may be the loader's."""

    def __init__(self, left: Mapping[str, str] | None = None, obstacle: str = "") -> None:
        self.plan = plan()
        self.device = torch.device("cpu")
        self.obstacle = obstacle
        self.left = dict(left or {})

    @property
    def targets(self) -> set[str]:
        return {"p", "q"} - self.left.keys()

    def left_to_loader(self) -> Mapping[str, str]:
        return self.left

    def leave(self, differing: Mapping[str, str]) -> None:
        self.left.update(dict.fromkeys(differing, "its loader put something else there"))


def plan() -> ReloadPlan:
    model = {name: torch.empty(2, device="meta") for name in "pq"}

    def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            model[name].copy_(tensor)

    return make_plan(record(load, model, {name: TensorSpec(torch.float32, (2,)) for name in "pq"}), model)  # type: ignore[arg-type]


def climb(ladder: Ladder[TwoLayers], key: object = "key", layers: TwoLayers | None = None) -> Rung:
    """One update that succeeds."""
    rung = ladder.begin("auto", ladder.layers_for(key, lambda: layers or TwoLayers()))
    assert (ladder.proof is not None) == (rung in (Rung.PROOF, Rung.CHECK))
    if ladder.proof is not None:
        ladder.judge({})
    ladder.succeeded()
    return rung


@pytest.fixture
def ladder() -> Ladder[TwoLayers]:
    return Ladder("the loader", "served")


def test_the_way_up_and_back_after_a_failure_or_a_change(ladder: Ladder[TwoLayers]) -> None:
    assert [climb(ladder) for _ in range(4)] == [Rung.PROOF, Rung.CHECK, Rung.PLAN, Rung.PLAN]
    assert [climb(ladder, "another") for _ in range(2)] == [Rung.PROOF, Rung.CHECK]
    ladder.begin("auto", ladder.layers_for("another", TwoLayers))
    ladder.failed()
    assert ladder.layers is None
    assert climb(ladder, "another") is Rung.PROOF
    assert [rung.word for rung in Rung] == ["loader", "proof", "plan", "plan"]


@pytest.mark.parametrize("ups", [1, 2, 3])
def test_a_plan_whose_copies_alone_were_done_stays_and_is_compared_again(ladder: Ladder[TwoLayers], ups: int) -> None:
    for _ in range(ups):
        climb(ladder)
    for _ in range(2):
        assert ladder.begin("auto", ladder.layers_for("key", TwoLayers)).by_plan
        ladder.interrupted()
    assert [climb(ladder) for _ in range(2)] == [Rung.CHECK, Rung.PLAN]
    assert climb(ladder, "another") is Rung.PROOF


def test_an_interrupted_proof_proves_nothing(ladder: Ladder[TwoLayers], tmp_path: Path) -> None:
    ladder.begin("auto", ladder.layers_for("key", TwoLayers))
    ladder.interrupted()
    assert climb(ladder) is Rung.PROOF
    tensors = {name: TensorSpec(torch.float32, (2,)) for name in "pq"}
    kept = KeptProofs({"engine": "one"}, tmp_path)
    kept.keep(plan().digest, tensors)
    other = Ladder[TwoLayers]("the loader", "served", lambda: kept)
    assert other.begin("auto", other.layers_for("key", TwoLayers, tensors)) is Rung.CHECK
    other.succeeded()
    assert other.begin("auto", other.layers_for("key", TwoLayers, tensors)) is Rung.PLAN
    other.interrupted()
    assert other.begin("auto", other.layers_for("key", TwoLayers, tensors)) is Rung.PROOF, "it has seen none itself"


def test_what_would_say_nothing_to_another_process_is_neither_kept_nor_asked_for(tmp_path: Path) -> None:
    class OwnAlone(Ladder[TwoLayers]):
        def digest_of(self, layers: TwoLayers) -> str:
            return "" if layers.left else layers.plan.digest

        def recall(self, layers: TwoLayers, is_proved: Callable[[str], bool]) -> bool:
            return not layers.left and super().recall(layers, is_proved)

    specs = {name: TensorSpec(torch.float32, (2,)) for name in "pq"}

    def first(left: Mapping[str, str], kept: KeptProofs | None) -> Rung:
        ladder = OwnAlone("the loader", "served", lambda: kept)
        rung = ladder.begin("auto", ladder.layers_for("key", lambda: TwoLayers(left), specs))
        ladder.succeeded()
        return rung

    proofs = KeptProofs({}, tmp_path)
    assert [first({"q": "computed"}, proofs) for _ in range(2)] == [Rung.PROOF, Rung.PROOF]
    assert not list(tmp_path.iterdir())
    assert [first({}, kept) for kept in (None, proofs, None, proofs)] == [Rung.PROOF] * 3 + [Rung.CHECK]


@pytest.mark.parametrize("stage", PlanStage)
def test_an_update_by_the_loader_proves_and_checks_nothing(ladder: Ladder[TwoLayers], stage: PlanStage) -> None:
    """It did: after an update by --reload loader, a plan that was never checked counted as checked."""
    for _ in range(stage):
        climb(ladder)
    expected = (Rung.PROOF, Rung.CHECK, Rung.PLAN)[stage]
    for _ in range(3):
        assert ladder.begin("loader", None) is Rung.LOADER
        assert (ladder.proof, ladder.reason) == (None, "")
        ladder.succeeded()
    assert climb(ladder) is expected


def test_a_refused_update_proves_nothing(ladder: Ladder[TwoLayers]) -> None:
    """It did: one that was refused, and one by the loader after it, made a plan count as proved."""
    layers = ladder.layers_for("key", lambda: TwoLayers({"q": "computed"}))
    with pytest.raises(WeightsRejectedError, match=r"'q' of the served model: computed.*--reload auto.*the loader"):
        ladder.begin("plan", layers)
    ladder.begin("loader", None)
    ladder.succeeded()
    assert climb(ladder) is Rung.PROOF


def test_what_keeps_a_plan_from_being_used_is_said(ladder: Ladder[TwoLayers]) -> None:
    for layers, obstacle in ((None, "it reads values"), (TwoLayers(obstacle="it reads values"), "")):
        assert ladder.begin("auto", layers, obstacle=obstacle) is Rung.LOADER
        assert ladder.reason == "it reads values"
        with pytest.raises(WeightsRejectedError, match="it reads values"):
            ladder.begin("plan", layers, obstacle=obstacle)
    everything = TwoLayers({"p": "computed", "q": "read"})
    assert ladder.begin("auto", everything) is Rung.LOADER
    assert ladder.reason == "p: computed; q: read"


def test_what_the_loader_put_elsewhere_stays_with_it_and_what_the_plan_did_is_an_error(
    ladder: Ladder[TwoLayers],
) -> None:
    layers = ladder.layers_for("key", TwoLayers)
    ladder.begin("auto", layers)
    assert ladder.reason == "the first update proves the plan"
    ladder.judge({"q": "q"})
    assert "put something else than planned into q (of q), which stays with it" in ladder.reason
    ladder.succeeded()
    assert ladder.begin("auto", layers) is Rung.CHECK
    assert (layers.targets, ladder.reason) == ({"p"}, "q: its loader put something else there")
    with pytest.raises(WorkerError, match=r"something else than tensor 'a' into 'p' of the served model \(1 differ"):
        ladder.judge({"p": "a"})
    ladder.failed()
    assert climb(ladder) is Rung.PROOF


def test_nothing_old_is_left_where_finding_out_fails(ladder: Ladder[TwoLayers]) -> None:
    climb(ladder)

    def fails() -> TwoLayers:
        raise WeightsRejectedError("the loader does not take it")

    with pytest.raises(WeightsRejectedError):
        ladder.layers_for("another", fails)
    assert (ladder.layers, ladder.stage) == (None, PlanStage.RECORDED)
