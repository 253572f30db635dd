"""Staging that outlives updates: what ranks and engine workers have mapped is read from the kernel."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from checkpoint_engine.device import CpuDevice
from checkpoint_engine.errors import CheckpointStateError, DeviceMemoryError, SettingError, UpdateError
from checkpoint_engine.receiver.cache import process_cache
from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.cluster import Cluster, check
from tests.core.worker_process import Rank, Worker, digests, stagings_of
from tests.waiting import within

SMALL = 64 << 10


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, set_bucket_size: Callable[[int], None]) -> None:
    set_bucket_size(SMALL)
    monkeypatch.setenv("PS_STAGING", "persistent")


@pytest.fixture
def server() -> Iterator[ParameterServer]:
    with ParameterServer(rank=0, world_size=1, device="cpu") as started:
        yield started


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.close()


@pytest.fixture
def another() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.close()


def tensors(largest: int = 1000) -> dict[str, torch.Tensor]:
    sizes = {f"t{index}": 9000 for index in range(20)} | {"large": largest}
    return {name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in sizes.items()}


def update(server: ParameterServer, worker: Worker, name: str) -> set[str]:
    """Brings new content to a worker's process, byte for byte; returns what the server then has mapped."""
    content = tensors()
    server.register_checkpoint(name, named_tensors=content)
    server.gather_metas(name)
    loaded: list[dict[str, str]] = []
    server.update(name, lambda handles: loaded.append(worker(handles[0][1])), timeout=timedelta(seconds=10))
    assert loaded == [digests(content)]
    return stagings_of(os.getpid())


def test_rank_and_worker_keep_the_same_memory_over_updates(server: ParameterServer, worker: Worker) -> None:
    seen: list[set[str]] = []
    for name in ("a", "b", "c"):
        mine = update(server, worker, name)
        assert mine == worker.stagings()
        assert len(mine) == 1
        seen.append(mine)
        report = server.last_report
        assert report is not None
        assert report.staging_kept == 2 * SMALL
    assert seen[0] == seen[1] == seen[2]
    assert server.release_staging() == 2 * SMALL
    assert server.release_staging() == 0
    assert not stagings_of(os.getpid())
    assert not worker.stagings()  # without a wait: release_staging returns only after the worker has unmapped it
    assert update(server, worker, "d") == worker.stagings() != seen[0]


def test_the_worker_unmaps_when_the_server_closes(worker: Worker) -> None:
    with ParameterServer(rank=0, world_size=1, device="cpu", staging="persistent") as server:
        assert update(server, worker, "a") == worker.stagings()
    assert not worker.stagings()


def test_the_default_frees_after_every_update(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PS_STAGING")
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        for name in ("a", "b"):
            assert not update(server, worker, name)
            assert not worker.stagings()
        report = server.last_report
        assert report is not None
        assert report.staging_kept == 0


def test_an_engine_restarted_between_updates(server: ParameterServer, worker: Worker, another: Worker) -> None:
    before = update(server, worker, "a")
    worker.close()
    assert update(server, another, "b") == another.stagings() == before
    assert update(server, another, "c") == another.stagings() == before


def test_a_worker_that_died_between_updates(server: ParameterServer, worker: Worker, another: Worker) -> None:
    update(server, worker, "a")
    worker.kill()
    server.register_checkpoint("b", named_tensors=tensors())
    server.gather_metas("b")
    with pytest.raises(UpdateError):
        server.update("b", lambda handles: None, timeout=timedelta(seconds=1))
    assert not stagings_of(os.getpid())  # nothing is kept after a failure
    assert update(server, another, "c") == another.stagings()


def test_another_worker_gets_the_memory_and_the_first_one_lets_go(
    server: ParameterServer, worker: Worker, another: Worker
) -> None:
    update(server, worker, "a")
    assert update(server, another, "b") == another.stagings()
    assert within(5, lambda: not worker.stagings())
    assert update(server, worker, "c") == worker.stagings()


def test_a_stopped_worker_does_not_hold_the_server_up_for_long(
    server: ParameterServer, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("checkpoint_engine.limits.UNMAP", 0.3)
    update(server, worker, "a")
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        assert within(5, worker.is_stopped)
        server.release_staging()
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert "has not unmapped" in caplog.text
    assert within(5, lambda: not worker.stagings())
    assert update(server, worker, "b") == worker.stagings()


def test_a_killed_rank_leaves_nothing_mapped(worker: Worker) -> None:
    content = tensors()
    rank = Rank(content, "persistent")
    try:
        assert rank.update(worker) == digests(content)
        assert rank.stagings() == worker.stagings()
        assert len(worker.stagings()) == 1
        rank.kill()
        assert within(5, lambda: not worker.stagings())
    finally:
        rank.close()


@pytest.mark.parametrize("pool", [True, False])
def test_lent_memory_goes_with_its_checkpoint_unless_that_is_pooled(
    server: ParameterServer, worker: Worker, pool: bool
) -> None:
    seen: list[set[str]] = []
    for name in ("a", "b"):
        content = tensors()
        server.register_checkpoint(name, named_tensors=content, use_shared_memory_pool=pool)
        server.gather_metas(name)
        loaded: list[dict[str, str]] = []
        server.update(name, lambda handles, to=loaded: to.append(worker(handles[0][1])), method="direct")
        assert loaded == [digests(content)]
        seen.append(worker.segments())
        assert len(seen[-1]) == 1
        server.unregister_checkpoint(name)
        assert worker.segments() == (seen[-1] if pool else set())
    assert (seen[0] == seen[1]) == pool
    assert server.release_staging() == 0
    assert not worker.segments()


# -- two ranks, as threads: what depends on sizes and failures ------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[Cluster]:
    cluster = Cluster(2)
    yield cluster
    cluster.close()
    assert [process_cache().mappings.nbytes(CpuDevice(rank)) for rank in (0, 1)] == [0, 0]


def assert_delivered(pair: Cluster, expected: dict[str, torch.Tensor]) -> None:
    for recorder in pair.recorders:
        assert recorder.loaded.keys() == expected.keys()
        assert all(torch.equal(recorder.loaded[name], expected[name]) for name in expected)


def kept(pair: Cluster) -> list[int]:
    reports = [server.last_report for server in pair.servers]
    assert [process_cache().mappings.nbytes(CpuDevice(rank)) for rank in (0, 1)] == [
        report and report.staging_kept for report in reports
    ]
    return [report.staging_kept for report in reports if report is not None]


def test_staging_grows_with_the_plan_and_does_not_shrink(pair: Cluster) -> None:
    sizes: list[int] = []
    mapped: list[set[str]] = []
    for name, largest in (("small", 1000), ("large", 1 << 20), ("small again", 1000)):
        content = tensors(largest)
        pair.register(name, content)
        check(pair.update(name))
        assert_delivered(pair, content)
        mine = kept(pair)
        assert mine[0] == mine[1]
        sizes.append(mine[0])
        mapped.append(stagings_of(os.getpid()))
    assert sizes[0] < sizes[1] == sizes[2]
    assert len(mapped[0]) == len(mapped[1]) == 2  # one a rank: the small ones are gone
    assert not mapped[0] & mapped[1]
    assert mapped[1] == mapped[2]


@pytest.mark.parametrize("staging", ["release", "persistent"])
def test_engines_complete_an_update_without_staging_unless_that_is_kept(
    clusters: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch, staging: str
) -> None:
    """What a layer needs to be repacked in may be just what staging took: an old script asks for buckets of 8 GiB."""
    monkeypatch.setenv("PS_STAGING", staging)
    pair = clusters(2)
    content = tensors()
    pair.register("a", content)
    loading: list[int] = []
    finishing: list[bool] = []
    for recorder in pair.recorders:
        recorder.on_load = lambda: loading.append(len(stagings_of(os.getpid())))
        recorder.on_finish = lambda: finishing.append(within(1, lambda: not stagings_of(os.getpid())))
    check(pair.update("a"))
    assert_delivered(pair, content)
    assert set(loading) == {2}  # of two ranks; here they and their workers are one process
    assert finishing == [staging == "release"] * 2


@pytest.mark.parametrize("phase", ["begin", "load", "finish"])
def test_nothing_is_kept_after_a_failure(pair: Cluster, phase: str) -> None:
    content = tensors()
    pair.register("a", content)
    check(pair.update("a"))
    pair.recorders[1].fail_in = phase
    assert all(isinstance(error, UpdateError) for error in pair.update("a"))
    pair.received.clear()  # the errors' tracebacks refer to tensors in the staging memory
    gc.collect()
    assert not stagings_of(os.getpid())
    assert [process_cache().mappings.nbytes(CpuDevice(rank)) for rank in (0, 1)] == [0, 0]
    pair.recorders[1].fail_in = ""
    check(pair.update("a"))
    assert_delivered(pair, content)


def test_kept_memory_counts_as_free_for_the_next_update(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.register("a", tensors())
    check(pair.update("a"))
    for server in pair.servers:
        monkeypatch.setattr(server.device, "memory", lambda **_: (0, 1 << 40))  # the engine has taken all that was left
        monkeypatch.setattr(server.device, "allocate", _refuse)
    before = stagings_of(os.getpid())
    check(pair.update("a"))
    assert stagings_of(os.getpid()) == before


def _refuse(nbytes: int) -> None:
    raise DeviceMemoryError(f"{nbytes} bytes were asked for, nothing is left")


def test_what_was_freed_unheard_is_not_taken_for_what_came_after(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the next allocation may well have the handle of the last one."""
    content = tensors()
    pair.register("a", content)
    check(pair.update("a"))
    before = stagings_of(os.getpid())
    for server in pair.servers:
        stagings = server._updates._stagings
        monkeypatch.setattr(stagings, "_end_leases", lambda: None)  # the worker does not hear of the end
        stagings.release()
        monkeypatch.undo()
        monkeypatch.setenv("PS_STAGING", "persistent")
    check(pair.update("a"))
    assert_delivered(pair, content)
    assert not before & stagings_of(os.getpid())


def test_staging_in_use_is_not_released(pair: Cluster) -> None:
    pair.register("a", tensors())
    refusals: list[CheckpointStateError] = []

    def meddle() -> None:
        pair.recorders[0].on_load = None
        with pytest.raises(CheckpointStateError, match="using") as refused:
            pair.servers[0].release_staging()
        refusals.append(refused.value)

    pair.recorders[0].on_load = meddle
    check(pair.update("a"))
    assert len(refusals) == 1


def test_only_two_lifetimes_are_known() -> None:
    with pytest.raises(SettingError, match="PS_STAGING"):
        ParameterServer(rank=0, world_size=1, device="cpu", staging="forever")
