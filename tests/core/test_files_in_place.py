"""Files that are used where they lie, and that somebody writes to: noticed before, during and after, never fatal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import CheckpointFormatError, UpdateError
from checkpoint_engine.source.segment import Segment
from tests.core.cluster import TIMEOUT, Cluster, check
from tests.core.p2p_help import needs_mooncake
from tests.waiting import within

Clusters = Callable[[int], Cluster]


def weights(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"layer.{i}": torch.randn(100_000, generator=generator) for i in range(20)}


def write_over(path: Path, step: int) -> None:
    """As safetensors before 0.7 and `cp` do: the very same file gets other bytes."""
    save_file(weights(step), path.with_suffix(".new"))
    with path.open("r+b") as file:
        file.write(path.with_suffix(".new").read_bytes())


def copy_over_with_its_time(path: Path, step: int) -> None:
    """As `cp -p` of a file that happens to be as old."""
    old = path.stat()
    write_over(path, step)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def write_through_a_mapping(path: Path, step: int) -> None:
    """Which leaves no time of change behind on tmpfs."""
    save_file(weights(step), path.with_suffix(".new"))
    mapped = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    mapped.copy_(torch.frombuffer(bytearray(path.with_suffix(".new").read_bytes()), dtype=torch.uint8))


def truncate(path: Path, step: int) -> None:
    os.truncate(path, path.stat().st_size // (2 * step))


def rename_over(path: Path, step: int) -> None:
    """As whoever thinks of readers: they keep the old file."""
    save_file(weights(step), path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


CHANGES = [write_over, copy_over_with_its_time, write_through_a_mapping, truncate]


@pytest.fixture
def file(on_tmpfs: Path) -> Path:
    save_file(weights(0), on_tmpfs / "model.safetensors")
    return on_tmpfs / "model.safetensors"


def register(cluster: Cluster, file: Path) -> None:
    """The file on the last rank, whose bytes then go to all."""
    cluster.servers[-1].register_checkpoint("a", files=[file])
    check(cluster.on_all(lambda server: server.gather_metas("a")))
    assert cluster.servers[-1]._store.get("a").files_in_place


def holds(cluster: Cluster, rank: int, step: int) -> bool:
    loaded = cluster.recorders[rank].loaded
    return loaded.keys() == weights(step).keys() and all(torch.equal(loaded[n], t) for n, t in weights(step).items())


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_written_again_is_refused_before_an_update(
    clusters: Clusters, file: Path, change: Callable[[Path, int], None]
) -> None:
    server = clusters(1).servers[0]
    server.register_checkpoint("a", files=[file])
    server.gather_metas("a")
    change(file, 1)
    with pytest.raises(CheckpointFormatError, match=r"model.safetensors was (written to|truncated)"):
        server.update("a", lambda _: pytest.fail("the engine is not even asked"))
    server.unregister_checkpoint("a")


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_written_again_during_an_update_fails_it_on_all_ranks(
    clusters: Clusters, file: Path, change: Callable[[Path, int], None], set_bucket_size: Callable[[int], None]
) -> None:
    set_bucket_size(1 << 20)
    pair = clusters(2)
    register(pair, file)
    check(pair.update("a"))
    pair.recorders[0].on_load = lambda: change(file, 1) if pair.recorders[0].buckets == 4 else None
    pair.recorders[0].buckets = 0
    for error in pair.update("a"):
        assert isinstance(error, UpdateError)
        assert error.rank == 1
        assert "model.safetensors was" in str(error)
    assert [recorder.finishes for recorder in pair.recorders] == [1, 1]


def test_a_file_that_another_replaces_goes_on_as_it_was(pair: Cluster, file: Path) -> None:
    register(pair, file)
    rename_over(file, 1)
    check(pair.update("a"))
    assert holds(pair, 0, 0)


@pytest.mark.parametrize("replaced", [False, True])
def test_only_who_asks_for_it_has_the_very_file_removed(clusters: Clusters, file: Path, replaced: bool) -> None:
    (server,) = clusters(1).servers
    for remove in (False, True):
        server.register_checkpoint("a", files=[file], remove_files=remove)
        if replaced:
            rename_over(file, 1)
        assert file.exists()
        server.unregister_checkpoint("a")
        assert file.exists() is (replaced or not remove)


@pytest.mark.usefixtures("unshared")
@needs_mooncake
@pytest.mark.parametrize("change", [write_over, truncate])
def test_ranks_that_stand_by_look_at_their_files_too(
    pair: Cluster, file: Path, change: Callable[[Path, int], None]
) -> None:
    register(pair, file)
    pair.recorders[0].on_load = lambda: change(file, 1) if pair.recorders[0].buckets == 8 else None
    for error in pair.on_all(
        lambda server: server.update("a", pair.asker(server.rank), ranks=[0], timeout=timedelta(seconds=TIMEOUT))
    ):
        assert isinstance(error, UpdateError), error
        assert any(said in str(error) for said in ("model.safetensors was", "no longer holds", "shares them no longer"))
    assert not pair.recorders[0].finishes


@pytest.mark.usefixtures("p2p_environment")
@needs_mooncake
def test_a_seed_whose_file_is_written_again_gives_it_to_nobody(clusters: Clusters, file: Path) -> None:
    seed, joiner = clusters(1), clusters(1)
    register(seed, file)
    catalog = Catalog.from_json(seed.servers[0].catalog("a").to_json())
    joiner.servers[0].load_catalogs([catalog])
    joiner.servers[0].update("a", joiner.asker(0))
    assert holds(joiner, 0, 0)
    last = joiner.recorders[0].buckets - 1
    joiner.recorders[0].buckets = 0
    joiner.recorders[0].on_load = lambda: write_over(file, 1) if joiner.recorders[0].buckets == last else None
    for _ in range(2):  # while it reads, and before
        with pytest.raises(UpdateError, match="no longer holds what its metas say"):
            joiner.servers[0].update("a", joiner.asker(0), timeout=timedelta(seconds=TIMEOUT))
    assert joiner.recorders[0].finishes == 1
    seed.servers[0].unregister_checkpoint("a")
    register(seed, file)
    joiner.servers[0].load_catalogs([seed.servers[0].catalog("a")])
    joiner.servers[0].update("a", joiner.asker(0))
    assert holds(joiner, 0, 1)


@pytest.mark.usefixtures("p2p_environment")
@needs_mooncake
def test_nothing_looks_at_files_that_nobody_shares(clusters: Clusters, file: Path) -> None:
    from threading import enumerate as threads

    def watches() -> int:
        return sum(thread.name == "checkpoint-engine-files" for thread in threads())

    seed = clusters(1)
    register(seed, file)
    assert watches() == 1
    seed.servers[0].unregister_checkpoint("a")
    assert within(5, lambda: watches() == 0)


def test_a_file_is_mapped_once_its_next_change_would_show(on_tmpfs: Path) -> None:
    path = on_tmpfs / "file"
    path.write_bytes(bytes(10_000))
    segment = Segment.map_file(path)
    assert time.time() >= path.stat().st_mtime + 0.02
    segment.check()
    segment.close()
