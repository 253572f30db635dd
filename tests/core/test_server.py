from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from checkpoint_engine.collective import connect_ranks
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    AddressInUseError,
    CheckpointStateError,
    DeadlineError,
    DuplicateTensorError,
    EngineRequestError,
    SettingError,
    UpdateError,
    WorkerTracebackError,
)
from checkpoint_engine.server import parameter_server
from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.cluster import Cluster, check
from tests.ports import free_port


@pytest.fixture(autouse=True)
def small_buckets(set_bucket_size: Callable[[int], None]) -> None:
    set_bucket_size(64 << 10)


@pytest.fixture(params=[1, 2, 3])
def cluster(request: pytest.FixtureRequest, clusters: Callable[[int], Cluster]) -> Cluster:
    return clusters(request.param)


def awkward_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shared = noise(40, 30)
    tensors = {f"layer.{i}.weight": noise(17 + i, 31).to(torch.bfloat16) for i in range(40)}
    return tensors | {
        "odd.bytes": torch.arange(7777, dtype=torch.int32).to(torch.uint8)[:777],
        "after.odd": noise(3).double(),
        "transposed": noise(50, 20).t(),
        "zero.size": torch.empty(0, 7),
        "scalar": torch.tensor(3.5 + seed),
        "shared.all": shared,
        "shared.part": shared[3:9, 4:],
        "larger.than.a.bucket": noise(300, 301),
        "fp8": noise(64, 64).to(torch.float8_e4m3fn),
        "flags": noise(33) > 0,
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_delivered(cluster: Cluster, tensors: dict[str, torch.Tensor]) -> None:
    for recorder in cluster.recorders:
        assert recorder.loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert recorder.loaded[name].dtype == tensor.dtype
            assert recorder.loaded[name].shape == tensor.shape
            assert bits(recorder.loaded[name]) == bits(tensor), name


def test_every_worker_gets_every_tensor_bit_for_bit(cluster: Cluster) -> None:
    for round_, name in enumerate(["a", "b", "a2"]):
        tensors = awkward_tensors(round_ % 2)
        cluster.register(name, tensors)
        check(cluster.update(name))
        assert_delivered(cluster, tensors)
        assert cluster.recorders[0].update is not None
        assert cluster.recorders[0].update.version == name
    report = cluster.servers[0].last_report
    assert report is not None
    assert report.tensors == len(awkward_tensors(0))
    assert report.buckets > 3
    assert report.engine == {"tensors": report.tensors}
    assert set(report.seconds) == {"connect", "copy", "broadcast", "load", "finish", "total"}


@pytest.mark.parametrize("phase", ["begin", "load", "finish"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_worker_that_fails_is_named_everywhere_and_the_next_update_works(pair: Cluster, phase: str, bad: int) -> None:
    tensors = awkward_tensors(0)
    pair.register("a", tensors)
    pair.recorders[bad].fail_in = phase
    started = time.monotonic()
    for error in pair.update("a"):
        assert isinstance(error, UpdateError)
        assert error.rank == bad
        assert f"told to fail in {phase}" in str(error)
    assert time.monotonic() - started < 10
    assert pair.recorders[bad].aborts == 1
    pair.recorders[bad].fail_in = ""
    check(pair.update("a"))
    assert_delivered(pair, tensors)


def test_no_worker_finishes_before_all_have_loaded_everything(pair: Cluster) -> None:
    pair.register("a", awkward_tensors(0))
    check(pair.update("a"))
    last = pair.recorders[1].buckets

    def fail_at_the_last_bucket() -> None:
        if pair.recorders[1].buckets == 2 * last:
            patience = Deadline(10)
            while pair.recorders[0].buckets < 2 * last and not patience.expired:
                time.sleep(0.01)
            time.sleep(0.2)  # the other rank has time to do the wrong thing
            raise ValueError("told to fail at the very end")

    pair.recorders[1].on_load = fail_at_the_last_bucket
    assert all(isinstance(error, UpdateError) and error.rank == 1 for error in pair.update("a"))
    assert pair.recorders[0].buckets == 2 * last
    assert [recorder.finishes for recorder in pair.recorders] == [1, 1]


def test_an_engine_that_refuses_ends_the_update_at_once(pair: Cluster) -> None:
    pair.register("a", awkward_tensors(0))

    def refuse(handles: list[tuple[str, str]]) -> None:
        raise EngineRequestError("the engine answered 500: no")

    started = time.monotonic()
    errors = pair.on_all(
        lambda server: server.update("a", refuse if server.rank == 0 else pair.asker(1), timeout=timedelta(seconds=30))
    )
    assert time.monotonic() - started < 10
    for error in errors:
        assert isinstance(error, UpdateError)
        assert (error.rank, error.phase) == (0, "connect")
        assert "answered 500" in str(error)
    check(pair.update("a"))


def test_an_engine_that_never_answers_runs_into_the_deadline(pair: Cluster) -> None:
    pair.register("a", awkward_tensors(0))
    started = time.monotonic()
    errors = pair.on_all(lambda server: server.update("a", lambda _: None, timeout=timedelta(seconds=1)))
    assert time.monotonic() - started < 8
    assert all(isinstance(error, UpdateError) and "within 1 s" in str(error) for error in errors)
    check(pair.update("a"))


def test_a_rank_that_leaves_before_the_others_connect(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.register("a", awkward_tensors(0))

    def refuse(*_: object) -> None:
        raise SettingError("this rank has no network")

    with monkeypatch.context() as patch:
        patch.setattr(pair.servers[1]._membership.group, "communicator", refuse)
        started = time.monotonic()
        errors = pair.update("a", timeout=3)
    assert time.monotonic() - started < 8
    assert all(isinstance(error, UpdateError) and error.rank == 1 for error in errors), errors
    assert "no network" in str(errors[0])
    check(pair.update("a"))


def test_abort_from_another_thread(pair: Cluster) -> None:
    pair.register("a", awkward_tensors(0))
    pair.recorders[0].on_load = lambda: pair.servers[1].abort("a person said so") and time.sleep(0.3)
    errors = pair.update("a")
    assert all(isinstance(error, UpdateError) and "a person said so" in str(error) for error in errors)
    assert [recorder.aborts for recorder in pair.recorders] == [1, 1]  # update returns once the workers have given up
    pair.recorders[0].on_load = None
    check(pair.update("a"))
    assert not pair.servers[0].abort("nothing runs")


def test_a_rank_that_stays_away_is_named(pair: Cluster) -> None:
    pair.register("a", awkward_tensors(0))
    with pytest.raises(UpdateError, match="rank 1 did not come"):
        pair.servers[0].update("a", pair.asker(0), timeout=timedelta(seconds=1))
    with pytest.raises(DeadlineError, match="rank 1 did not come"):
        pair.servers[0].store_based_barrier(timedelta(seconds=0.5))


def test_a_tensor_that_differs_between_two_ranks(pair: Cluster) -> None:
    for server in pair.servers:
        server.register_checkpoint("a", named_tensors={"only.once": torch.full((3,), float(server.rank))})
    for error in pair.on_all(lambda server: server.gather_metas("a")):
        assert isinstance(error, DuplicateTensorError)
        assert "only.once" in str(error)
        assert "rank 0" in str(error)
        assert "rank 1" in str(error)


def test_calls_in_the_wrong_state(pair: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    server = pair.servers[0]
    server.register_checkpoint("a", named_tensors={"x": torch.ones(3)})
    with pytest.raises(CheckpointStateError, match="gather_metas"):
        server.update("a", pair.asker(0))
    with pytest.raises(CheckpointStateError, match="registered"):
        server.register_checkpoint("a", named_tensors={"x": torch.zeros(3)})
    with caplog.at_level("WARNING"):
        server.unregister_checkpoint("nothing")  # as upstream does; scripts clean up whatever came of registering
    assert "'nothing' is not registered" in caplog.text
    check(pair.on_all(lambda s: s.gather_metas("a")))
    with pytest.raises(SettingError, match="ranks 0 to 1"):
        server.update("a", pair.asker(0), ranks=[1, 2])
    check(pair.on_all(lambda s: s.gather_metas("nobody has it")))
    with pytest.raises(CheckpointStateError, match="nobody has it"):
        server.update("nobody has it", pair.asker(0))


def test_nothing_takes_a_checkpoint_away_from_a_running_update(pair: Cluster) -> None:
    pair.register("a", awkward_tensors(0))
    refusals: list[CheckpointStateError] = []

    def meddle() -> None:
        pair.recorders[0].on_load = None
        with pytest.raises(CheckpointStateError, match="update") as unregistering:
            pair.servers[0].unregister_checkpoint("a")
        with pytest.raises(CheckpointStateError, match="running") as updating:
            pair.servers[0].update("a", pair.asker(0))
        refusals.extend([unregistering.value, updating.value])

    pair.recorders[0].on_load = meddle
    check(pair.update("a"))
    assert len(refusals) == 2
    pair.servers[0].unregister_checkpoint("a")


def test_staging_falls_back_as_memory_shrinks(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = awkward_tensors(0)
    pair.register("a", tensors)
    largest = 300 * 301 * 4
    stagings = []
    for free in (1 << 30, int(1.5 * largest), 1000):
        for server in pair.servers:
            monkeypatch.setattr(server.device, "memory", lambda free=free, **_: (free, free), raising=True)
        check(pair.update("a"))
        assert_delivered(pair, tensors)
        report = pair.servers[0].last_report
        assert report is not None
        stagings.append(report.staging)
    assert "two rings" in stagings[0]
    assert "one ring" in stagings[1]
    assert "host" in stagings[2]


def test_ranks_come_from_arguments_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SettingError, match="RANK"):
        ParameterServer()
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        assert (server.rank, server.world_size) == (0, 1)
    with pytest.raises(SettingError, match="not one of"):
        ParameterServer(rank=2, world_size=2, device="cpu")
    monkeypatch.setenv("PS_MEM_FRACTION", "much")
    with pytest.raises(SettingError, match="PS_MEM_FRACTION"):
        ParameterServer(rank=0, world_size=1, device="cpu")


def test_a_port_in_use_is_named() -> None:
    port = free_port()
    plane = connect_ranks(0, 2, "127.0.0.1", port)
    with pytest.raises(AddressInUseError, match=str(port)):
        connect_ranks(0, 2, "127.0.0.1", port)
    plane.close()
    connect_ranks(0, 2, "127.0.0.1", port).close()


def test_where_a_worker_failed_is_the_cause_of_the_error(clusters: Callable[[int], Cluster]) -> None:
    cluster = clusters(1)
    cluster.register("a", {"t": torch.ones(10)})
    cluster.recorders[0].fail_in = "load"

    def ask(handles: list[tuple[str, str]]) -> None:
        with contextlib.suppress(ValueError):  # an engine answers; its worker's error stays in its process
            cluster.asker(0)(handles)

    with pytest.raises(UpdateError) as caught:
        cluster.servers[0].update("a", ask)
    chain: list[BaseException] = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert isinstance(chain[-1], WorkerTracebackError)
    assert "in _maybe_fail" in str(chain[-1])


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_server, "accelerator_count", lambda: 2)  # none are here
    with pytest.raises(SettingError, match="gpu_count is 3, but this host has 2"):
        ParameterServer(rank=0, world_size=1, gpu_count=3, device="cpu")
