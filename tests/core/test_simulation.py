"""The simulator of steps: bytes are neither lost nor faster than wires, and measured updates come out as measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulate import check
from simulation.fluid import Flow, simulate
from simulation.machines import Machine
from simulation.models import MODELS, catalog_of
from simulation.steps import simulate_step

pytestmark = pytest.mark.pure

WIRES = {"a": 1.0, "b": 2.0, "c": 4.0}


def test_a_wire_is_shared_fairly_and_what_is_left_goes_to_who_can_use_it() -> None:
    flows = [Flow("slow", 1.0, ("a",)), Flow("both", 1.0, ("a", "b")), Flow("fast", 3.0, ("b",))]
    assert [interval.end for interval in simulate(WIRES, flows)] == [2.0, 2.0, 2.0]
    later = [Flow("first", 2.0, ("b",)), Flow("second", 2.0, ("b",), (0,), seconds=0.5)]
    assert [(each.begin, each.end) for each in simulate(WIRES, later)] == [(0.0, 1.0), (1.0, 2.5)]


def test_what_waits_for_itself_is_told() -> None:
    with pytest.raises(ValueError, match="hen waits for ever"):
        simulate(WIRES, [Flow("hen", after=(1,)), Flow("egg", after=(0,))])
    with pytest.raises(ValueError, match="no wire"):
        simulate(WIRES, [Flow("lost", 1.0)])


@st.composite
def flows(draw: st.DrawFn) -> list[Flow]:
    made: list[Flow] = []
    for number in range(draw(st.integers(1, 12))):
        wires = draw(st.sets(st.sampled_from(sorted(WIRES)), min_size=1))
        after = draw(st.sets(st.integers(0, number - 1))) if number else set[int]()
        made.append(Flow(str(number), draw(st.integers(1, 50)), tuple(sorted(wires)), tuple(sorted(after))))
    return made


@given(flows())
def test_no_wire_carries_more_than_it_can_and_none_idles_while_a_flow_could_use_it(given_flows: list[Flow]) -> None:
    intervals = simulate(WIRES, given_flows)
    end = max(interval.end for interval in intervals)
    for wire, rate in WIRES.items():
        assert sum(flow.nbytes for flow in given_flows if wire in flow.wires) <= rate * end * (1 + 1e-9)
    for flow, interval in zip(given_flows, intervals, strict=True):
        assert interval.begin == max((intervals[other].end for other in flow.after), default=0.0)
    one_after_the_other = sum(flow.nbytes / min(WIRES[wire] for wire in flow.wires) for flow in given_flows)
    assert end <= one_after_the_other * (1 + 1e-9)


@pytest.mark.thorough
def test_updates_that_were_measured_come_out_within_a_seventh() -> None:
    found = check()
    assert {(row["method"], row["gpus"]) for row in found} >= {("broadcast", 1), ("broadcast", 2), ("direct", 2)}
    assert all(0.85 < row["ratio"] < 1.15 for row in found), found


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["broadcast", "direct", "join", "device"])
def test_twice_the_gpus_never_take_longer_than_their_bound_allows(method: str) -> None:
    steps = [
        simulate_step(Machine(1, gpus), catalog_of(MODELS["dense32b"](), gpus), method, parallel=gpus)
        for gpus in (2, 4)
    ]
    assert all(step.bound < step.seconds for step in steps)
    assert steps[1].seconds < steps[0].seconds
