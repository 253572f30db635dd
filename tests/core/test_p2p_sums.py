"""With checksums, a bit that flips between two hosts is noticed by whoever reads: read again, or named."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
import torch

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.p2p.store import ByteRange, P2PStore, Peer
from tests.core.cluster import Cluster
from tests.core.p2p_help import needs_mooncake
from tests.core.p2p_processes import tensors_of

pytestmark = [needs_mooncake, pytest.mark.usefixtures("p2p_environment")]

TIMEOUT = timedelta(seconds=30)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "1")


@pytest.fixture
def flips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As many reads come with one bit changed as its only number says; Mooncake's own are whole."""
    left = [0]
    plain = P2PStore.read

    def read(store: P2PStore, peer: Peer, ranges: Sequence[ByteRange], check: Callable[[], None]) -> None:
        plain(store, peer, ranges, check)
        if left[0]:
            left[0] -= 1
            ctypes.c_uint8.from_address(ranges[0].target + ranges[0].nbytes // 2).value ^= 4

    monkeypatch.setattr(P2PStore, "read", read)
    return left


@pytest.fixture
def joiner(clusters: Callable[[int], Cluster]) -> Cluster:
    """One that reads from a seed of the same process."""
    seed, joiner = clusters(1), clusters(1)
    seed.register("a", tensors_of(1))
    joiner.servers[0].load_catalogs([seed.servers[0].catalog("a")])
    return joiner


def join(cluster: Cluster) -> None:
    cluster.servers[0].update("a", cluster.asker(0), timeout=TIMEOUT)


def assert_holds(cluster: Cluster, version: int) -> None:
    for recorder in cluster.recorders:
        assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors_of(version).items())


def test_what_was_damaged_on_the_way_is_read_again(joiner: Cluster, flips: list[int]) -> None:
    flips[0] = 1
    join(joiner)
    assert flips == [0]
    assert_holds(joiner, 1)


def test_what_is_always_damaged_is_named(joiner: Cluster, flips: list[int]) -> None:
    flips[0] = 1_000_000
    with pytest.raises(UpdateError, match=r"tensor 'layer\.\d+' did not arrive as it was registered"):
        join(joiner)
    flips[0] = 0
    join(joiner)
    assert_holds(joiner, 1)


def test_without_checksums_it_is_served(
    clusters: Callable[[int], Cluster], flips: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the option is what finds it."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "0")
    seed, joiner = clusters(1), clusters(1)
    seed.register("a", tensors_of(1))
    joiner.servers[0].load_catalogs([seed.servers[0].catalog("a")])
    flips[0] = 1
    join(joiner)
    with pytest.raises(AssertionError):
        assert_holds(joiner, 1)


def test_memory_that_a_step_fills_again_loses_the_sums_of_what_was_there(clusters: Callable[[int], Cluster]) -> None:
    (server,) = clusters(1).servers
    server.register_checkpoint("a", named_tensors=tensors_of(1), use_shared_memory_pool=True, checksum=True)
    server._store.refresh("a", tensors_of(2), tensors_stay=False, at_once=True, farewell=lambda _name, *, stays: None)
    sums = [tensor.checksum for entry in server._store.get("a").entries for tensor in entry.tensors]
    assert set(sums) == {None}
