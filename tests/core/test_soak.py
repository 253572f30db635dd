"""Ranks, workers and seeds that live long: however often updates fail, and wherever, nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.core.p2p_help import needs_mooncake
from tests.core.soak_fleet import Fault, Fleet, Way, open_fleet

pytestmark = [needs_mooncake, pytest.mark.long]

ROUNDS = 5
WINDOWS = 4


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with open_fleet() as made:
        yield made


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        (way, fault)
        for way in ("broadcast", "direct", "join")
        for fault in ("none", "begin", "load", "finish", "deadline", "seed moves on")
        if fault != "seed moves on" or way == "join"
    ],
)
def test_nothing_grows(fleet: Fleet, way: Way, fault: Fault) -> None:
    for _ in range(2):  # what this way keeps for the next update, and what it gives back of the last one's
        fleet.update(way, fault)
    grown: dict[str, int] = {}
    for _ in range(WINDOWS):
        before = fleet.left_behind()
        for _ in range(ROUNDS):
            errors = fleet.update(way, fault)
            assert bool(errors) == (fault != "none"), errors
        after = fleet.left_behind()
        grown = {name: after[name] - before[name] for name in after if after[name] - before[name] >= ROUNDS - 1}
        if not grown:  # pools, such as Mooncake's of connections, are full some time; a leak is in every window
            break
    assert grown == {}
    assert fleet.update(way, "none") == []
