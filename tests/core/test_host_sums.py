"""A bit that flips in host memory after it was registered ends an update by the tensor's name, if asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.errors import SettingError, UpdateError
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.methods import Method
from tests.core.cluster import Cluster, check

pytestmark = [pytest.mark.pure, pytest.mark.thorough]


def flip(cluster: Cluster, rank: int, name: str) -> None:
    """One bit of a tensor, where it lies."""
    held = cluster.servers[rank]._store.get("a")
    for segment, entry in zip(held.segments, held.entries, strict=True):
        for tensor in entry.tensors:
            if tensor.name == name:
                assert isinstance(segment, Segment)
                segment.tensor[tensor.offset + tensor.nbytes - 1] ^= 4
                return
    raise AssertionError(name)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"w{number}": torch.randn(1000 + number) for number in range(4)}


@pytest.mark.parametrize("method", [Method.BROADCAST, Method.DIRECT])
def test_a_flipped_bit_is_refused_by_name_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, clusters: Callable[[int], Cluster], tensors: dict[str, torch.Tensor], method: str
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "1")
    cluster = clusters(2)
    cluster.register("a", tensors)
    check(cluster.update("a", method=method))
    flip(cluster, 1, "w3")
    for error in cluster.update("a", method=method):
        assert isinstance(error, UpdateError)
        assert "the bytes of tensor 'w3' in host memory are not those that were registered as 'a'" in str(error)
    assert [recorder.finishes for recorder in cluster.recorders] == [1, 1]
    flip(cluster, 1, "w3")
    check(cluster.update("a", method=method))
    assert all(torch.equal(recorder.loaded["w3"], tensors["w3"]) for recorder in cluster.recorders)


def test_a_bit_that_flips_while_it_is_sent_is_noticed_before_the_engine_finishes(
    monkeypatch: pytest.MonkeyPatch, clusters: Callable[[int], Cluster], tensors: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "1")
    cluster = clusters(2)
    cluster.register("a", tensors)
    flips = iter([True])  # with the first bucket of several
    cluster.recorders[0].on_load = lambda: flip(cluster, 0, "w0") if next(flips, False) else None
    assert all(isinstance(error, UpdateError) and "'w0'" in str(error) for error in cluster.update("a"))
    assert [recorder.finishes for recorder in cluster.recorders] == [0, 0]


def test_it_is_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    clusters: Callable[[int], Cluster],
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    cluster = clusters(1)
    cluster.register("a", tensors)
    flip(cluster, 0, "w0")
    check(cluster.update("a"))
    save_file(tensors, tmp_path / "x.safetensors")
    cluster.servers[0].register_checkpoint("b", files=[tmp_path / "x.safetensors"], checksum=True)
    check(cluster.on_all(lambda server: server.gather_metas("b")))
    check(cluster.update("b"))
    cluster.servers[0].unregister_checkpoint("b")
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "yes")
    with pytest.raises(SettingError, match="1 or 0"):
        Cluster(1)
