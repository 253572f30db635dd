"""Faults put into recorder, plan and replay on purpose.

Each is found twice over: by what proves a plan, which keeps it from being used; and, had it slipped through, by the
oracle, which compares with a cold start, and by the engine's comparison with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine, make_checkpoint
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.reload import reloader as reloading
from checkpoint_engine.reload import replay as replaying
from checkpoint_engine.reload.ladder import PlanStage
from checkpoint_engine.reload.plan import Fill, Piece, ReloadPlan, make_plan
from checkpoint_engine.reload.recorder import _Recorder
from checkpoint_engine.reload.regions import Region
from tests.oracle.walk import contents, differences
from tests.zoo.senders import Order, Sender

pytestmark = pytest.mark.pure

SPEC = ModelSpec(hidden=16, layers=1, head_dim=4, intermediate=8, experts=2, vocab=51)
"""Over two workers: one more row than they share evenly, so that there are zeros to be written."""
RANK = 1
GATE, UP = "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"
Patch = pytest.MonkeyPatch


def piece_of(plan: ReloadPlan, name: str, **changes: Any) -> ReloadPlan:
    first, *rest = plan.pieces[name]
    return replace(plan, pieces={**plan.pieces, name: (msgspec.structs.replace(first, **changes), *rest)})


def dropped(plan: ReloadPlan) -> ReloadPlan:
    return replace(plan, pieces={**plan.pieces, GATE: ()})


def swapped(plan: ReloadPlan) -> ReloadPlan:
    (gate,), (up,) = plan.pieces[GATE], plan.pieces[UP]
    plan = piece_of(plan, GATE, target_region=up.target_region)
    return piece_of(plan, UP, target_region=gate.target_region)


def of_a_stale_origin(plan: ReloadPlan) -> ReloadPlan:
    """What came from one tensor is said to come from another."""
    (gate,) = plan.pieces[GATE]
    other = msgspec.structs.replace(gate, source=UP)
    return replace(plan, pieces={**{n: p for n, p in plan.pieces.items() if n != GATE}, UP: (*plan.pieces[UP], other)})


def of_another_rank(plan: ReloadPlan) -> ReloadPlan:
    region = plan.pieces[GATE][0].region
    return piece_of(plan, GATE, region=Region(0, region.shape, region.stride))


def turned(plan: ReloadPlan) -> ReloadPlan:
    """The rows of a tensor in the order of its columns."""
    region = plan.pieces[GATE][0].region
    return piece_of(plan, GATE, region=Region(region.offset, region.shape, (1, region.shape[0])))


def repeated(plan: ReloadPlan) -> ReloadPlan:
    """One row everywhere."""
    region = plan.pieces[GATE][0].region
    return piece_of(plan, GATE, region=Region(region.offset, region.shape, (0, region.stride[1])))


def of_another_dtype(plan: ReloadPlan) -> ReloadPlan:
    return piece_of(plan, GATE, source_dtype=torch.float16)  # as wide, so that nothing breaks


def shortened(plan: ReloadPlan) -> ReloadPlan:
    """Without its last row."""
    piece = plan.pieces[GATE][0]
    rows = (piece.region.shape[0] - 1, *piece.region.shape[1:])
    source, target = (Region(each.offset, rows, each.stride) for each in (piece.region, piece.target_region))
    return piece_of(plan, GATE, region=source, target_region=target)


def without_zeros(plan: ReloadPlan) -> ReloadPlan:
    return replace(plan, fills={})


def with_ones(plan: ReloadPlan) -> ReloadPlan:
    return replace(
        plan, fills={target: tuple(replace(each, value=1.0) for each in fills) for target, fills in plan.fills.items()}
    )


PLANS = [
    *(dropped, swapped, of_a_stale_origin, of_another_rank, turned, repeated, of_another_dtype, shortened),
    *(without_zeros, with_ones),
]


def record_without_offsets(patch: Patch) -> None:
    def of(tensor: torch.Tensor) -> Region:
        return Region(0, tuple(tensor.shape), tuple(tensor.stride()))

    original = _Recorder._trace

    def trace(self: _Recorder, tensor: torch.Tensor) -> Any:
        found = original(self, tensor)
        return None if found is None else (*found[:2], of(tensor), found[3])

    patch.setattr(_Recorder, "_trace", trace)


def record_only_the_first(patch: Patch) -> None:
    """Of copies into one parameter, which the plan then has for all of it."""

    def make(recording: Any, targets: Mapping[str, torch.Tensor]) -> ReloadPlan:
        seen: dict[str, Piece] = {}
        for piece in recording.pieces:
            seen.setdefault(piece.target, piece)
        plan = make_plan(recording, targets)
        return replace(
            plan,
            pieces={
                name: tuple(each for each in found if each in seen.values()) for name, found in plan.pieces.items()
            },
        )

    patch.setattr(reloading, "make_plan", make)


def replay_into_what_is_gone(patch: Patch) -> None:
    make = replaying._make_step

    def make_step(piece: Piece, target: torch.Tensor | None) -> Any:
        return make(piece, None if target is None else target.clone() if piece.source == GATE else target)

    patch.setattr(replaying, "_make_step", make_step)
    patch.setattr(replaying.Replay, "load", replaying.Replay._copy_each)


def replay_one_bucket_as_another(patch: Patch) -> None:
    def program_for(self: Any, delivery: Any) -> Any:
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(len(delivery.names), replaying._Program(self._steps, delivery))

    patch.setattr(replaying.Replay, "_program_for", program_for)


def replay_without_the_last(patch: Patch) -> None:
    copy = replaying._copy_all

    def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if len(targets) > 1:
            copy(targets[:-1], sources[:-1])

    patch.setattr(replaying, "_copy_all", copy_all)
    patch.setattr(replaying.Replay, "load", replaying.Replay._copy_each)


PARTS = [
    *(record_without_offsets, record_only_the_first),
    *(replay_into_what_is_gone, replay_one_bucket_as_another, replay_without_the_last),
]


def broken(fault: Callable[[Any], Any], patch: Patch) -> None:
    """Puts a fault in."""
    if fault in PARTS:
        fault(patch)
    else:
        patch.setattr(reloading, "make_plan", lambda recording, targets: fault(make_plan(recording, targets)))


class Worker:
    """One that started without weights."""

    def __init__(self, directory: Path) -> None:
        self.checkpoints = [make_checkpoint(directory / str(seed), SPEC, seed=seed) for seed in (1, 2)]
        self.sink = ReferenceSink(ReferenceEngine(SPEC, tp_rank=RANK, tp_size=2))
        self.sender = Sender(self.sink, torch.device("cpu"))

    def update(self, to: int, mode: str = "auto") -> dict[str, Any]:
        return self.sender.send(self.tensors(to), mode, Order(1, seed=None))

    def tensors(self, of: int) -> dict[str, torch.Tensor]:
        return {n: t for file in sorted(self.checkpoints[of].glob("*.safetensors")) for n, t in load_file(file).items()}

    def wrong(self, as_of: int) -> list[str]:
        """What the oracle finds."""
        cold = ReferenceEngine.cold_start(self.checkpoints[as_of], tp_rank=RANK, tp_size=2)
        return differences(*(contents(_as_module(engine)) for engine in (self.sink.engine, cold)))


def _as_module(engine: ReferenceEngine) -> torch.nn.Module:
    module: Any = torch.nn.Module()
    module.weights = engine.parameters
    return module


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_without_a_fault_nothing_is_found(worker: Worker) -> None:
    for to in (1, 0, 1, 0):
        assert worker.update(to).get("loader_bytes", -1) in (0, sum(t.nbytes for t in worker.tensors(to).values()))
        assert worker.wrong(to) == []
        assert worker.update(to, "verify")["different_tensors"] == 0
    assert worker.wrong(1)
    plan = worker.sink._reloader._ladder.layers.plan  # type: ignore[union-attr]
    assert isinstance(next(iter(plan.fills.values()))[0], Fill), "or two of the faults are none"


@pytest.mark.parametrize("fault", [*PLANS, *PARTS])
def test_a_fault_is_found_before_it_does_harm(worker: Worker, fault: Callable[[Any], Any], monkeypatch: Patch) -> None:
    """By proof, or by the check of the first update by plan: an update that succeeds has left what it should."""
    broken(fault, monkeypatch)
    said = [worker.update(to) for to in (1, 0, 1)]
    assert any("error" in each for each in said) or any(each["loader_bytes"] for each in said[1:])
    if "error" not in said[-1]:
        assert worker.wrong(1) == []


@pytest.mark.parametrize("fault", [*PLANS, *PARTS])
def test_a_fault_that_nothing_proved_is_found_by_the_oracle_and_by_verify(
    worker: Worker, fault: Callable[[Any], Any], monkeypatch: Patch
) -> None:
    broken(fault, monkeypatch)
    ladder = worker.sink._reloader._ladder
    monkeypatch.setattr(type(ladder), "stage", property(lambda _: PlanStage.CHECKED))
    said = worker.update(1)
    assert "error" not in said, said
    assert said["reload"] == "plan"
    assert worker.wrong(1), "nothing was broken"
    assert worker.update(1, "verify")["different_tensors"]
