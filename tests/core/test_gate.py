"""Ranks of one host begin each broadcast together; whom they cannot see they do not wait for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import pytest
import torch

from checkpoint_engine.transfer import broadcast
from checkpoint_engine.transfer.exports import Export
from checkpoint_engine.transfer.gate import BroadcastGate
from tests.core.cluster import Cluster, check


@pytest.fixture
def gates() -> Iterator[list[BroadcastGate]]:
    made = [BroadcastGate() for _ in range(3)]
    yield made
    for gate in made:
        gate.close()


def meet(gates: list[BroadcastGate]) -> None:
    for gate in gates:
        gate.meet({rank: other.exported for rank, other in enumerate(gates) if other is not gate})


def test_nobody_passes_before_all_are_there(gates: list[BroadcastGate]) -> None:
    meet(gates)
    first, second, third = gates
    assert not first.passed(0)
    assert not second.passed(0)
    assert third.passed(0)
    assert first.passed(0)
    assert not first.passed(1)
    assert not third.passed(2)  # ahead of the others, which is no reason for those to wait
    assert second.passed(1)


def test_a_rank_alone_waits_for_nobody(gates: list[BroadcastGate]) -> None:
    gates[0].meet({})
    assert gates[0].passed(0)


def test_ranks_of_other_hosts_are_not_waited_for(gates: list[BroadcastGate]) -> None:
    first, second, third = gates
    first.meet({1: msgspec.structs.replace(second.exported, host="elsewhere"), 2: third.exported})
    assert not first.passed(0)
    third.passed(0)
    assert first.passed(0)


def test_a_rank_that_has_gone_is_not_waited_for(gates: list[BroadcastGate]) -> None:
    first, second, _ = gates
    second.close()
    first.meet({1: second.exported})
    assert first.passed(0)


def test_in_an_update_every_rank_waits_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[list[int]] = []
    passed: list[int] = []

    class Noted(BroadcastGate):
        def meet(self, exports: Mapping[int, Export]) -> None:
            met.append(sorted(exports))
            super().meet(exports)

        def passed(self, index: int) -> bool:
            done = super().passed(index)
            passed.extend([index] * done)
            return done

    monkeypatch.setattr(broadcast, "BroadcastGate", Noted)
    cluster = Cluster(3)
    cluster.register("a", {f"t{index}": torch.arange(9.0) for index in range(9)})
    check(cluster.update("a"))
    assert sorted(met) == [[0, 1], [0, 2], [1, 2]]
    assert passed
    assert all(passed.count(index) == 3 for index in passed)
    cluster.close()
