from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.errors import SettingError
from checkpoint_engine.planning.receivers import Assignment, Port, ReadLoad, assign_receivers, lower_bound

pytestmark = pytest.mark.pure


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[ReadLoad], list[Port], list[Port]]:
    rates = {f"nic{i}": draw(st.sampled_from([1.0, 2.0, 4.0, 12.5])) for i in range(draw(st.integers(1, 5)))}

    def ports(side: str) -> st.SearchStrategy[list[Port]]:
        port = st.sampled_from(sorted(rates)).map(lambda nic: Port(f"{side}/{nic}", rates[nic]))
        return st.lists(port, min_size=1, max_size=12)

    senders, receivers = draw(ports("out")), draw(ports("in"))
    owners = st.sets(st.integers(0, len(senders) - 1), min_size=1, max_size=3).map(lambda s: tuple(sorted(s)))
    loads = draw(st.lists(st.builds(ReadLoad, st.integers(0, 1000), owners), max_size=60))
    return loads, senders, receivers


def seconds_on_cards(
    moves: Sequence[Assignment], loads: Sequence[ReadLoad], ports: Sequence[Port], side: str
) -> dict[str, float]:
    seconds: dict[str, float] = {port.nic: 0.0 for port in ports}
    for move in moves:
        port = ports[getattr(move, side)]
        seconds[port.nic] += loads[move.load].nbytes / port.rate
    return seconds


@pytest.mark.thorough
@given(problems())
@settings(max_examples=300, deadline=None)
def test_every_load_is_moved_once_from_an_owner(problem: tuple[list[ReadLoad], list[Port], list[Port]]) -> None:
    loads, senders, receivers = problem
    moves = assign_receivers(loads, senders, receivers)
    assert sorted(move.load for move in moves) == list(range(len(loads)))
    assert all(move.sender in loads[move.load].owners for move in moves)
    assert all(0 <= move.receiver < len(receivers) for move in moves)
    assert moves == assign_receivers(list(loads), list(senders), list(receivers))


@pytest.mark.thorough
@given(problems())
@settings(max_examples=300, deadline=None)
def test_receiving_cards_differ_by_two_loads_at_most(problem: tuple[list[ReadLoad], list[Port], list[Port]]) -> None:
    """Where senders are slow, a read may run at half a card's rate while another card takes two."""
    loads, senders, receivers = problem
    moves = assign_receivers(loads, senders, receivers)
    busy = seconds_on_cards(moves, loads, receivers, "receiver")
    slowest = min(port.rate for port in receivers)
    largest = max((load.nbytes for load in loads), default=0)
    assert max(busy.values()) - min(busy.values()) <= 2 * largest / slowest + 1e-9
    for nic in busy:
        carried = defaultdict[int, int](int)
        for move in moves:
            carried[move.receiver] += loads[move.load].nbytes
        behind = [carried[i] for i, port in enumerate(receivers) if port.nic == nic]
        assert max(behind) - min(behind) <= largest


@pytest.mark.thorough
@given(problems())
@settings(max_examples=300, deadline=None)
def test_no_card_works_less_than_the_bound_says(problem: tuple[list[ReadLoad], list[Port], list[Port]]) -> None:
    loads, senders, receivers = problem
    moves = assign_receivers(loads, senders, receivers)
    out = seconds_on_cards(moves, loads, senders, "sender")
    into = seconds_on_cards(moves, loads, receivers, "receiver")
    bound = lower_bound(loads, senders, receivers)
    assert max(*out.values(), *into.values()) >= bound - 1e-9


@given(st.integers(1, 6), st.integers(1, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_owners_of_the_same_bytes_send_side_by_side(copies: int, count: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    loads = [ReadLoad(size, tuple(range(copies))) for size in sizes]
    senders = [Port(f"out{i}") for i in range(copies)]
    moves = assign_receivers(loads, senders, [Port("in")])
    busy = seconds_on_cards(moves, loads, senders, "sender")
    assert max(busy.values()) - min(busy.values()) <= max(sizes)


def test_all_senders_work_at_any_time() -> None:
    """After any part of the moves, every sender has done about that part of its own."""
    loads = [ReadLoad(100, (i % 4,)) for i in range(400)]
    senders = [Port(f"out{i}") for i in range(4)]
    moves = assign_receivers(loads, senders, [Port(f"in{i}") for i in range(8)])
    for end in range(0, 400, 40):
        counts = [sum(move.sender == s for move in moves[:end]) for s in range(4)]
        assert max(counts) - min(counts) <= 1


def test_a_faster_card_takes_more() -> None:
    loads = [ReadLoad(10, (0, 1)) for _ in range(300)]
    moves = assign_receivers(loads, [Port("fast", 2.0), Port("slow", 1.0)], [Port("a", 1.0), Port("b", 4.0)])
    assert sum(move.sender == 0 for move in moves) == 200
    assert sum(move.receiver == 1 for move in moves) == 240


def test_bytes_of_a_single_owner_bound_the_time() -> None:
    senders, receivers = [Port("a", 10.0), Port("b", 10.0)], [Port(f"r{i}", 10.0) for i in range(10)]
    assert lower_bound([ReadLoad(100, (0,)), ReadLoad(100, (0, 1))], senders, receivers) == 10.0
    assert lower_bound([ReadLoad(100, (0, 1)), ReadLoad(100, (0, 1))], senders, receivers) == 10.0
    assert lower_bound([ReadLoad(100, (0, 1))] * 2, senders, receivers[:1]) == 20.0
    assert lower_bound([], senders, receivers) == 0.0


def test_4096_receivers_are_planned_within_a_second() -> None:
    loads = [ReadLoad(256 << 20, (i % 4096, (i * 7 + 1) % 4096)) for i in range(16384)]
    ports = [Port(f"nic{i}", 50e9) for i in range(4096)]
    started = time.process_time()
    moves = assign_receivers(loads, ports, ports)
    assert time.process_time() - started < 1
    busy = seconds_on_cards(moves, loads, ports, "receiver")
    assert len(set(busy.values())) == 1


@pytest.mark.parametrize(
    ("loads", "receivers", "match"),
    [
        ([], [], "nobody"),
        ([ReadLoad(1, ())], [Port("a")], "held by"),
        ([ReadLoad(1, (1,))], [Port("a")], "held by"),
        ([], [Port("a", 0.0)], "rate"),
        ([], [Port("a", float("nan"))], "rate"),
    ],
)
def test_what_cannot_be_assigned_is_refused(loads: list[ReadLoad], receivers: list[Port], match: str) -> None:
    for function in (assign_receivers, lower_bound):
        with pytest.raises(SettingError, match=match):
            function(loads, [Port("s")], receivers)
