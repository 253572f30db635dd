"""Direct updates: workers read the ranks' host memory by themselves."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.device.memory import HostMemory, SharedSegments
from checkpoint_engine.errors import LinkError, RankError, SettingError, UpdateError, WorkerError
from checkpoint_engine.link.messages import PROTOCOL, Begin, TensorSlice, encode_buckets
from checkpoint_engine.receiver.cache import process_cache
from checkpoint_engine.receiver.layouts import LayoutCache
from checkpoint_engine.receiver.reception import pick_handle, receive_update
from checkpoint_engine.receiver.refusal import refuse_update
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.direct import find_obstacle
from checkpoint_engine.transfer.exports import ExportedSegments, export_segments
from tests.core.cluster import TIMEOUT, Cluster, Recorder, check
from tests.waiting import within

EARLIER: set[str] = set()
"""Segments of other tests, by their inodes: what their reads may still be answered into stays mapped for good."""


@pytest.fixture(autouse=True)
def small_buckets(set_bucket_size: Callable[[int], None]) -> None:
    set_bucket_size(16 << 10)


@pytest.fixture(params=[1, 3])
def cluster(request: pytest.FixtureRequest, clusters: Callable[[int], Cluster]) -> Cluster:
    return clusters(request.param)


def noise(seed: int, count: int = 30) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn((17 + i, 31), generator=generator).bfloat16() for i in range(count)}
    odd = {"scalar": torch.tensor(3.5 + seed), "empty": torch.empty(0, 3), "odd": torch.ones(7, dtype=torch.int8)}
    return tensors | odd


def holds(cluster: Cluster, expected: dict[str, torch.Tensor]) -> bool:
    return all(
        recorder.loaded.keys() == expected.keys()
        and all(torch.equal(recorder.loaded[name], tensor) for name, tensor in expected.items())
        for recorder in cluster.recorders
    )


def segment_mappings() -> list[str]:
    """By the inodes of their segments: one for each mapping in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[4] for line in lines if "checkpoint-engine-segment" in line]


@pytest.fixture(autouse=True)
def mapped_earlier() -> None:
    gc.collect()
    EARLIER.clear()
    EARLIER.update(segment_mappings())


def mapped_segments() -> int:
    """Mappings of segments in this process, those of the ranks themselves included."""
    gc.collect()
    return sum(inode not in EARLIER for inode in segment_mappings())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_every_worker_takes_every_tensor(cluster: Cluster) -> None:
    for seed in (1, 2):
        tensors = noise(seed)
        cluster.register(f"v{seed}", tensors)
        check(cluster.update(f"v{seed}", method="direct"))
        assert holds(cluster, tensors)
    for server in cluster.servers:
        report = server.last_report
        assert report is not None
        assert report.method == "direct"
        assert report.staging.startswith("none")
        assert report.buckets > 1
        assert "broadcast" not in report.seconds


def test_workers_keep_their_mappings_until_the_memory_goes(pair: Cluster) -> None:
    pair.register("v1", noise(1))
    own, descriptors = mapped_segments(), open_descriptors()
    check(pair.update("v1", method="direct"))
    kept, kept_descriptors = mapped_segments(), open_descriptors()
    assert kept == own + 4, "each of two workers maps the segments of both ranks"
    for _ in range(3):
        check(pair.update("v1", method="direct"))
    assert (mapped_segments(), open_descriptors()) == (kept, kept_descriptors)
    assert holds(pair, noise(1))
    for server in pair.servers:
        server.unregister_checkpoint("v1")
    assert mapped_segments() == kept, "tensors of memory leave it to the next ones, and workers keep it mapped"
    for server in pair.servers:
        server.register_checkpoint("nothing", named_tensors={})
        server.unregister_checkpoint("nothing", force=True)
    assert within(5, lambda: mapped_segments() == 0)
    assert within(5, lambda: open_descriptors() <= descriptors)


def test_what_was_worked_out_for_a_bucket_serves_the_next_update(pair: Cluster) -> None:
    given: dict[int, list[Delivery]] = {}
    for number, (recorder, load) in enumerate([(each, each.load) for each in pair.recorders]):

        def note(tensors: Delivery, number: int = number, load: Callable[[Delivery], None] = load) -> None:
            given.setdefault(number, []).append(tensors)
            load(tensors)

        recorder.load = note  # type: ignore[method-assign, assignment]
    pair.register("v1", noise(1))
    rounds: list[list[Delivery]] = []
    for name, method in (("v1", "direct"), ("v1", "direct"), ("v1", "broadcast"), ("v1", "direct")):
        given.clear()
        check(pair.update(name, method=method))
        rounds.append(given[0])
    first, again, broadcast, anew = rounds
    assert len(first) == len(again) > 1
    assert all(one is other and one.stays for one, other in zip(first, again, strict=True))
    assert not any(each.stays for each in broadcast)
    assert not {id(each) for each in first} & {id(each) for each in anew}, "a broadcast has unmapped the memory"
    known = set(process_cache().layouts.snapshot())
    check(pair.update("v1", method="direct"))
    assert set(process_cache().layouts.snapshot()) == known


def test_a_layout_that_a_worker_does_not_know_is_refused() -> None:
    begin = Begin(PROTOCOL, "", "", "id", "a", "v", HostMemory(0), encode_buckets(()), layout="other")
    cache = LayoutCache()
    with pytest.raises(LinkError, match="refers to layout other"):
        cache.layout_of(begin, {})
    with pytest.raises(LinkError, match="announces no buckets"):
        cache.layout_of(msgspec.structs.replace(begin, buckets=msgspec.Raw(b"\x01"), layout=""), {})
    twice = encode_buckets([[TensorSlice("a", "int8", (1,), 0)], [TensorSlice("a", "int8", (1,), 0)]])
    with pytest.raises(LinkError, match="a tensor twice"):
        cache.layout_of(msgspec.structs.replace(begin, buckets=twice, layout=""), {})


def test_they_go_with_a_broadcast_with_a_failure_and_with_the_server(pair: Cluster) -> None:
    pair.register("v1", noise(1))
    own = mapped_segments()
    check(pair.update("v1", method="direct"))
    check(pair.update("v1"))
    assert within(5, lambda: mapped_segments() == own)
    check(pair.update("v1", method="direct"))
    pair.recorders[0].fail_in = "finish"
    assert all(isinstance(error, UpdateError) for error in pair.update("v1", method="direct"))
    pair.received.clear()  # the errors' tracebacks refer to tensors in the memory
    assert within(5, lambda: mapped_segments() == own)
    pair.recorders[0].fail_in = ""
    check(pair.update("v1", method="direct"))
    pair.close()
    assert within(5, lambda: mapped_segments() == 0)


def test_auto_is_direct_where_that_is_possible_and_says_so(pair: Cluster) -> None:
    pair.register("v1", noise(1))
    check(pair.update("v1", method="auto"))
    assert [server.last_report and server.last_report.method for server in pair.servers] == ["direct", "direct"]
    assert holds(pair, noise(1))


def test_a_file_in_place_is_refused_by_name_and_auto_takes_broadcast(pair: Cluster, on_tmpfs: Path) -> None:
    save_file(noise(1), on_tmpfs / "model.safetensors")
    pair.servers[0].register_checkpoint("v1", files=[on_tmpfs / "model.safetensors"])
    pair.servers[1].register_checkpoint("v1", named_tensors={"other": torch.ones(3)})
    check(pair.on_all(lambda server: server.gather_metas("v1")))
    errors = pair.update("v1", method="direct")
    assert all(isinstance(error, UpdateError) for error in errors)
    assert "model.safetensors is used where it lies" in str(errors[1])
    assert "--method broadcast" in str(errors[1])
    check(pair.update("v1", method="auto"))
    assert holds(pair, noise(1) | {"other": torch.ones(3)})
    assert pair.servers[0].last_report is not None
    assert pair.servers[0].last_report.method == "broadcast"


def test_a_worker_that_fails_ends_the_update_everywhere(pair: Cluster) -> None:
    pair.register("v1", noise(1))
    pair.recorders[1].fail_in = "load"
    errors = pair.update("v1", method="direct")
    assert all(isinstance(error, UpdateError) for error in errors)
    assert all("told to fail in load" in str(error) for error in errors)
    assert pair.recorders[0].finishes == 0
    pair.recorders[1].fail_in = ""
    check(pair.update("v1", method="direct"))
    assert holds(pair, noise(1))


@pytest.mark.parametrize("method", ["direct", "broadcast"])
def test_a_worker_that_takes_no_part_is_not_waited_for(pair: Cluster, method: str) -> None:
    """Its engine answers only once all of its workers are done, and the others would wait until the deadline."""
    pair.register("v1", noise(1))
    heard: list[bool] = []

    def ask(handles: list[tuple[str, str]]) -> None:
        with ThreadPoolExecutor(1) as pool:
            device = CpuDevice(0)
            other = pool.submit(receive_update, handles[1][1], pair.recorders[1], CpuDevice(1), timeout=TIMEOUT)
            heard.append(refuse_update(dict(handles), device, WorkerError("it is busy with another one")))
            other.result()

    began = time.monotonic()
    timeout = timedelta(seconds=TIMEOUT)
    errors = pair.on_all(
        lambda server: server.update("v1", ask if not server.rank else lambda _: None, timeout=timeout, method=method)
    )
    assert heard == [True]
    assert time.monotonic() - began < TIMEOUT / 2
    assert all("rank 0" in str(error) and "it is busy with another one" in str(error) for error in errors), errors
    assert pair.recorders[1].finishes == 0
    assert not refuse_update({"cpu:0": "ce-link:///nowhere/link#token"}, CpuDevice(0), WorkerError("busy"))
    check(pair.update("v1", method=method))
    assert holds(pair, noise(1))


def test_one_rank_feeds_all_workers_of_its_host() -> None:
    alone = Cluster(1)
    try:
        alone.register("v1", noise(1))
        workers = [Recorder() for _ in range(3)]

        def update() -> None:
            with ThreadPoolExecutor(3) as pool:

                def ask(handles: list[tuple[str, str]]) -> None:
                    assert [name for name, _ in handles] == ["worker:0", "worker:1", "worker:2"]
                    devices = [CpuDevice(rank) for rank in range(3)]
                    chosen = [pick_handle(dict(handles), device, rank, 3) for rank, device in enumerate(devices)]
                    taken = [
                        pool.submit(receive_update, handle, worker, device, timeout=TIMEOUT)
                        for handle, worker, device in zip(chosen, workers, devices, strict=True)
                    ]
                    for each in taken:
                        each.result()

                alone.servers[0].update("v1", ask, method="direct", workers=3)

        gpu = SimpleNamespace(torch_device=torch.device("cuda", 0), identity="GPU-1")
        assert pick_handle({"worker:0": "a", "worker:1": "b"}, gpu, 1, 2) == "b", "a rank without a GPU knows none"  # type: ignore[arg-type]
        update()
        assert all(worker.loaded.keys() == noise(1).keys() for worker in workers)
        workers[2].fail_in = "load"
        with pytest.raises(UpdateError, match="worker on worker:2 failed in load"):
            update()
        assert [worker.aborts for worker in workers] == [1, 1, 1]
        assert [worker.finishes for worker in workers] == [1, 1, 1]
        workers[2].fail_in = ""
        update()
        assert [worker.finishes for worker in workers] == [2, 2, 2]
        with pytest.raises(SettingError, match="only in a direct update"):
            alone.servers[0].update("v1", lambda _: None, workers=3)
    finally:
        alone.close()


def test_methods_take_turns(pair: Cluster) -> None:
    pair.register("v1", noise(1))
    for method in ("direct", "broadcast", "direct"):
        check(pair.update("v1", method=method))
        assert holds(pair, noise(1))
        assert pair.servers[0].last_report is not None
        assert pair.servers[0].last_report.method == method


def test_a_part_of_the_ranks_is_not_updated_directly(pair: Cluster) -> None:
    pair.register("v1", noise(1))
    with pytest.raises(SettingError, match="goes to all ranks"):
        pair.servers[0].update("v1", lambda _: None, ranks=[0], method="direct")


# -- what is lent ---------------------------------------------------------------------------------------------------


def test_ranks_on_other_hosts_stand_in_the_way() -> None:
    here = export_segments([])
    silent = Holding(0, "here", "cpu:0", (SegmentEntry(8, (TensorEntry("t", "int8", (8,), 0),)),))
    heard = msgspec.structs.replace(silent, p2p_address="here:1", generation=5)
    assert find_obstacle([here, here], Catalog("a", (silent,))) == ""
    assert "different hosts" in find_obstacle([here, replace_host(here)], Catalog("a", (silent,)))
    assert find_obstacle([here, replace_host(here)], Catalog("a", (heard,))) == ""


def replace_host(offer: object) -> object:
    return type(offer)("elsewhere", offer.process, offer.segments)  # type: ignore[attr-defined]


def test_memory_that_was_given_up_is_not_lent() -> None:
    segment = Segment.create(4096)
    offer = export_segments([segment])
    segment.close()
    with pytest.raises(RankError, match=r"cannot open the host memory of rank 0|has given up"):
        ExportedSegments({0: offer})


def test_a_lease_names_the_very_segments() -> None:
    one, other = Segment.create(4096), Segment.create(4096)
    lent = [ExportedSegments({0: export_segments(segments)}) for segments in ([one], [other], [one], [one, other])]
    leases = [each.memory.lease for each in lent]
    assert leases[0] == leases[2]
    assert len(set(leases)) == 3
    for each in lent:
        each.close()
    one.close()
    other.close()


def test_what_could_shrink_is_not_mapped(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    descriptors = (os.open(file, os.O_RDWR), os.memfd_create("x", os.MFD_CLOEXEC))
    with pytest.raises(LinkError, match="not sealed"):
        CpuDevice(0).map(SharedSegments((4096, 4096)), descriptors)
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_descriptor_too_few() -> None:
    with pytest.raises(LinkError, match="2 segments were announced, 0 file descriptors"):
        CpuDevice(0).map(SharedSegments((4096, 4096)), ())


_WITHOUT_CONTEXT = """
import torch
from checkpoint_engine.server.parameter_server import ParameterServer

with ParameterServer(rank=0, world_size=1, device="cpu") as server:
    server.register_checkpoint("a", named_tensors={"t": torch.ones(1 << 20)})
    server.gather_metas("a")
    try:
        server.update("a", lambda _: (_ for _ in ()).throw(RuntimeError("nobody is there")), method="direct")
    except Exception as error:
        assert "nobody is there" in str(error), error
    assert not torch.cuda.is_initialized()
"""


@pytest.mark.gpu
def test_a_rank_of_a_direct_update_takes_no_memory_of_a_gpu() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_CONTEXT], check=True, timeout=120)
