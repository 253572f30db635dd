"""The network between hosts fails: bounded, the lost one named with the phase, and the next push heals.

Hosts are network namespaces, the network is the kernel's. What every rank got is compared with what was sent, bit for
bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint_engine import limits
from tests.core.p2p_help import needs_mooncake
from tests.p2p.host_ranks import RankOnHost, Said, all_of, alone_on, ranks_on
from tests.p2p.hosts import Network, why_not

pytestmark = [pytest.mark.long, needs_mooncake, pytest.mark.skipif(bool(why_not()), reason=why_not())]

UPDATE = 60
"""Seconds that an update may take: no fault is to last that long."""
BOUND = limits.SILENCE + limits.BEAT + limits.EXPLANATION + 2
LOST_SEED = 3 + 2 * limits.PEER_KNOCK + 5
"""Seconds: the patience of these ranks, then a knock after the read that failed and one before a second try."""
SILENT = "gave no sign of life"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(3) as made:
        yield made


@pytest.fixture(scope="module")
def started(network: Network) -> Iterator[list[RankOnHost]]:
    with ranks_on(network, 2) as made:
        assert_done(all_of(made, "step", 1, "broadcast", UPDATE))
        yield made


@pytest.fixture
def ranks(started: list[RankOnHost], network: Network) -> Iterator[list[RankOnHost]]:
    """Two that live through all tests, each on a host of its own; afterwards the next push heals, at once."""
    yield started
    network.plug(1)
    network.drop(1, 0)
    assert_done(all_of(started, "step", 3, "broadcast", UPDATE))


def assert_done(said: list[Said]) -> None:
    assert [each.words for each in said] == ["done"] * len(said)


def begin_to_load(ranks: list[RankOnHost], method: str) -> None:
    for rank in ranks:
        rank.order("step", 2, method, UPDATE)
    ranks[0].wait_until_it_loads()


rarely = pytest.param("direct", marks=pytest.mark.endurance)


@pytest.mark.parametrize("method", ["broadcast", rarely])
def test_a_cable_that_is_pulled(ranks: list[RankOnHost], network: Network, method: str) -> None:
    begin_to_load(ranks, method)
    network.pull(1)
    for number, (seconds, words) in enumerate([rank.answer() for rank in ranks]):
        lost = 1 - number  # of two that do not hear each other, each misses the other
        assert (
            f"UpdateError of rank {lost}: the update to 'a' failed on rank {lost} in phase 'load': rank {lost}" in words
        )
        assert SILENT in words
        assert seconds < BOUND


def test_a_cable_that_was_pulled_before(ranks: list[RankOnHost], network: Network) -> None:
    network.pull(1)
    for seconds, words in all_of(ranks, "step", 2, "broadcast", UPDATE):
        assert "RankError of rank" in words
        assert SILENT in words
        assert seconds < BOUND


@pytest.mark.endurance
def test_a_host_that_answers_nothing(ranks: list[RankOnHost], network: Network) -> None:
    begin_to_load(ranks, "broadcast")
    network.drop(1, 1)
    for seconds, words in [rank.answer() for rank in ranks]:
        assert "in phase 'load'" in words
        assert SILENT in words
        assert seconds < BOUND


def test_a_partition_that_heals_in_time_is_no_fault(ranks: list[RankOnHost], network: Network) -> None:
    begin_to_load(ranks, "broadcast")
    network.drop(1, 1)
    time.sleep(limits.SILENCE / 2)
    network.drop(1, 0)
    assert_done([rank.answer() for rank in ranks])


@pytest.mark.endurance
@pytest.mark.parametrize("method", ["broadcast", "direct"])
def test_of_three_packets_one_goes_astray(ranks: list[RankOnHost], network: Network, method: str) -> None:
    """The update comes through; or time is over, or the rank is named whose signs of life went astray."""
    limit = 12.0
    network.drop(1, 0.3)
    for seconds, words in all_of(ranks, "step", 2, method, limit):
        assert words == "done" or ("Error of rank" in words and "phase" in words), words
        assert seconds < limit + BOUND


def test_seeds_that_are_cut_off_while_they_are_read(network: Network, tmp_path: Path) -> None:
    with alone_on(network, 3) as (reader, *seeds):
        metas = [tmp_path / f"metas-{number}.json" for number in range(2)]
        for seed, file in zip(seeds, metas, strict=True):
            seed.order("share", 1, file)
            assert_done([seed.answer()])

        reader.order("join", *metas, UPDATE)
        reader.wait_until_it_loads()
        network.pull(1)  # the other one takes over
        assert_done([reader.answer()])
        network.plug(1)

        reader.order("join", metas[0], UPDATE)
        reader.wait_until_it_loads()
        network.drop(1, 1)
        seconds, words = reader.answer()
        assert "in phase 'load'" in words
        assert "its only holder: rank 0 on " in words
        assert f"at {network.address(1)}:" in words
        assert "its host does not answer" in words
        assert seconds < LOST_SEED
        network.drop(1, 0)

        reader.order("join", *metas, UPDATE)
        assert_done([reader.answer()])
