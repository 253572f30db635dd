"""Staging and traces on one real GPU, with the worker in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.worker_process import Worker, digests

pytestmark = pytest.mark.gpu

BUCKET = 32 << 20


@pytest.fixture(autouse=True)
def bucket_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(BUCKET / (1 << 30)))


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker(device="cuda")
    yield started
    started.close()


def update(server: ParameterServer, worker: Worker, name: str, *, trace: bool = False) -> None:
    """Brings 200 MB of new content to the worker's process, byte for byte."""
    content = {f"t{i}": torch.randint(0, 256, (10 << 20,), dtype=torch.uint8) for i in range(20)}
    server.register_checkpoint(name, named_tensors=content, use_shared_memory_pool=True)
    server.gather_metas(name)
    loaded: list[dict[str, str]] = []
    server.update(
        name, lambda handles: loaded.append(worker(handles[0][1])), timeout=timedelta(seconds=60), trace=trace
    )
    assert loaded == [digests(content)]
    server.unregister_checkpoint(name)


def used() -> int:
    """Bytes of the GPU that anybody uses."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_persistent_staging_stays_until_it_is_released(worker: Worker) -> None:
    with ParameterServer(rank=0, world_size=1, device="cuda", staging="persistent") as server:
        for name in ("a", "b", "c"):
            update(server, worker, name)
            report = server.last_report
            assert report is not None
            assert report.staging_kept == 2 * BUCKET
        kept = used()
        assert server.release_staging() == 2 * BUCKET
        assert kept - used() >= 2 * BUCKET  # the driver has it back only once the worker has unmapped it too
        update(server, worker, "d")  # very likely at the same address and with the same handle
        update(server, worker, "e")


def test_staging_is_given_back_after_every_update(worker: Worker) -> None:
    with ParameterServer(rank=0, world_size=1, device="cuda", staging="release") as server:
        update(server, worker, "a")
        before = used()
        update(server, worker, "b")
        assert used() - before < BUCKET


def test_another_process_gets_the_memory_that_is_kept(worker: Worker) -> None:
    with ParameterServer(rank=0, world_size=1, device="cuda", staging="persistent") as server:
        update(server, worker, "a")
        worker.kill()
        another = Worker(device="cuda")
        try:
            update(server, another, "b")
            update(server, another, "c")
        finally:
            another.close()


def test_times_of_the_gpu_are_those_of_the_host(worker: Worker) -> None:
    with ParameterServer(rank=0, world_size=1, device="cuda") as server:
        update(server, worker, "a")
        began = time.perf_counter()
        update(server, worker, "b", trace=True)
        ended = time.perf_counter()
        report = server.last_report
        assert report is not None
        assert report.trace is not None
        spans = {(span.lane, span.bucket): span for span in report.trace.spans if span.bucket is not None}
        assert all(began <= span.begin <= span.end <= ended for span in spans.values())
        for bucket in range(report.buckets):
            # A millisecond of grace for the one event by which the clocks are compared.
            assert spans["copy", bucket].end <= spans["load", bucket].begin + 1e-3
