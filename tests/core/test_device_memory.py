"""Tensors that stay where a trainer has them: workers map them there and copy, and every step brings other weights."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.device.imported_blocks import ImportedBlocks
from checkpoint_engine.device.memory import Allocation
from checkpoint_engine.errors import CheckpointStateError, DuplicateTensorError, LinkError
from checkpoint_engine.source.device_segment import DeviceSegment, keep_in_place
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import SegmentPool
from checkpoint_engine.transfer.methods import Method
from tests.core.cluster import Cluster, assert_no_threads_left


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(16 / (1 << 20)))  # 16 KiB


@pytest.fixture(params=[1, 2])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = Cluster(request.param)
    yield cluster
    cluster.close()
    assert_no_threads_left()


@pytest.fixture
def alone() -> Iterator[Cluster]:
    cluster = Cluster(1)
    yield cluster
    cluster.close()


def weights(count: int = 12) -> dict[str, torch.Tensor]:
    """Parameters in a few shared storages, as a trainer's are; one is tied, and one of another dtype."""
    flat = torch.zeros(count * 800, dtype=torch.bfloat16).share_memory_()
    found = {f"layer.{i}.weight": flat[i * 800 : i * 800 + 20 * 31].view(20, 31) for i in range(count)}
    found["norm"] = torch.zeros(33).share_memory_()
    found["embedding"] = torch.zeros(64, 9).share_memory_()
    found["head"] = found["embedding"]
    return found


def train(tensors: Mapping[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """Changes everything in place; returns copies of what it is then."""
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_holds(cluster: Cluster, expected: Mapping[str, torch.Tensor]) -> None:
    for recorder in cluster.recorders:
        assert recorder.loaded.keys() == expected.keys()
        assert not [name for name, tensor in expected.items() if not torch.equal(recorder.loaded[name], tensor)]


def publish(cluster: Cluster, tensors: Mapping[str, torch.Tensor], version: str, method: Method = "direct") -> None:
    size = len(cluster.servers)
    shares = [dict(list(tensors.items())[rank::size]) for rank in range(size)]
    if size > 1:  # both names of tied tensors lie on one rank
        shares[1].pop("head", None), shares[0].pop("head", None)
        shares[0 if "embedding" in shares[0] else 1]["head"] = tensors["head"]
    cluster.publish(shares, version, method)


@pytest.mark.parametrize("method", ["direct", "broadcast", "auto"])
def test_every_step_brings_what_the_trainer_has_now(
    cluster: Cluster, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Segment:
        raise AssertionError(f"host memory was taken: {arguments}")

    monkeypatch.setattr(SegmentPool, "take", refuse)
    tensors = weights()
    for step in range(4):
        expected = train(tensors, step)
        publish(cluster, tensors, f"step-{step}", method)
        assert_holds(cluster, expected)
        assert all(recorder.update and recorder.update.version == f"step-{step}" for recorder in cluster.recorders)
    for server in cluster.servers:
        assert server.last_report is not None
        assert server.last_report.method == ("broadcast" if method == "broadcast" else "direct")


@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_but_the_trainer_keeps_its_tensors_after_a_step(alone: Cluster, *, in_place: bool) -> None:
    """Not even until garbage is collected: trainers put that off, and their weights fill a GPU."""
    tensors, asker = weights(), alone.asker(0)
    gone = weakref.ref(tensors["norm"])

    def ask(handles: list[tuple[str, str]], _: object = tensors) -> None:
        asker(handles)

    gc.collect()
    gc.disable()
    try:
        for step in range(3):
            alone.servers[0].publish(tensors, ask, version=str(step), method="direct", in_place=in_place)
        alone.servers[0].unregister_checkpoint("published", force=True)
        del tensors, ask
        if not in_place:
            alone.servers[0].close()
        assert gone() is None
    finally:
        gc.enable()


def test_the_same_tensors_are_gathered_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[str] = []
    for server in cluster.servers:
        gather = server.gather_metas
        monkeypatch.setattr(
            server,
            "gather_metas",
            lambda name, gather=gather, **options: (gathered.append(name), gather(name, **options))[1],
        )
    tensors = weights()
    for step in range(3):
        train(tensors, step)
        publish(cluster, tensors, f"step-{step}")
    assert len(gathered) == len(cluster.servers)


def test_a_trainer_may_move_its_tensors_between_steps(cluster: Cluster) -> None:
    for step in range(3):
        tensors = weights()
        expected = train(tensors, step)
        publish(cluster, tensors, f"step-{step}")
        assert_holds(cluster, expected)


def test_a_trainer_may_have_others_in_the_next_step(cluster: Cluster) -> None:
    for step, count in enumerate((12, 5, 20)):
        tensors = weights(count)
        expected = train(tensors, step)
        publish(cluster, tensors, f"step-{step}")
        assert_holds(cluster, expected)


def blocks_mapped() -> int:
    """Mappings of a trainer's shared storages in this process, the trainer's own included."""
    gc.collect()
    return sum("/torch_" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_workers_unmap_what_goes_before_its_owner_may_free_it(alone: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, server = weights(), alone.servers[0]
    own = blocks_mapped()
    train(tensors, 0)
    publish(alone, tensors, "step-0")
    assert blocks_mapped() == 2 * own
    unmapped: list[int] = []
    close = DeviceSegment.close
    monkeypatch.setattr(DeviceSegment, "close", lambda segment: (unmapped.append(blocks_mapped()), close(segment)))
    moved = weights()
    expected = train(moved, 1)
    publish(alone, moved, "step-1")
    assert unmapped == [2 * own]  # the old storages and the new, but no worker's mapping of them
    assert_holds(alone, expected)
    server.unregister_checkpoint("published")
    assert unmapped[-1] == 2 * own


def test_what_others_cannot_map_is_copied_and_said(alone: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    tensors = weights() | {"private": torch.zeros(40), "turned": torch.zeros(6, 5).share_memory_().t()}
    for step in range(3):
        expected = train(tensors, step)
        with caplog.at_level(logging.WARNING):
            publish(alone, tensors, f"step-{step}")
        assert_holds(alone, expected)
    assert "2 tensors of 'published' were copied to host memory (" in caplog.text


def turn(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.t()


@pytest.mark.parametrize("spoil", [lambda tensor: tensor.untyped_storage().resize_(0), turn])
def test_memory_that_its_owner_has_freed_or_turned_is_named(
    alone: Cluster, spoil: Callable[[torch.Tensor], object]
) -> None:
    tensors = weights() | {"square": torch.zeros(8, 8).share_memory_()}
    server = alone.servers[0]
    server.register_checkpoint("policy", named_tensors=tensors, in_place=True)
    server.gather_metas("policy")
    spoil(tensors["square"])
    with pytest.raises(CheckpointStateError, match=r"'square' was registered in place and has been moved, reshaped"):
        server.update("policy", alone.asker(0), method="direct")
    assert alone.recorders[0].update is None


def test_a_copy_is_published_if_the_caller_wants_to_go_on_training(alone: Cluster) -> None:
    tensors = weights()
    for step in range(3):
        expected = train(tensors, step)
        server = alone.servers[0]
        server.publish(tensors, alone.asker(0), version=f"step-{step}", in_place=False, method="direct")
        assert_holds(alone, expected)


def test_tensors_that_share_a_part_of_their_memory_are_copied() -> None:
    flat = torch.zeros(100).share_memory_()
    divided = keep_in_place({"a": flat[:60], "b": flat[40:], "c": flat[:60]}, CpuDevice(0))
    assert divided.segment is not None
    assert set(divided.segment.names) == {"a", "c"}
    assert divided.left.keys() == {"b"}
    assert divided.why == "b: it shares a part of its memory with another tensor"
    divided.segment.close()


def test_two_names_for_the_same_bytes_are_allowed_in_device_memory_alone() -> None:
    tensors = (TensorEntry("a", "float32", (4,), 0), TensorEntry("b", "float32", (4,), 0))
    Catalog("c", (Holding(0, "h", "d", (SegmentEntry(16, tensors, kind="device"),)),)).validate()
    twice = (TensorEntry("a", "float32", (4,), 0), TensorEntry("a", "float32", (4,), 0))
    with pytest.raises(DuplicateTensorError):
        Catalog("c", (Holding(0, "h", "d", (SegmentEntry(16, twice, kind="device"),)),)).validate()


def test_what_lies_in_no_allocation_is_refused() -> None:
    memory = [torch.zeros(100, dtype=torch.uint8), torch.zeros(50, dtype=torch.uint8)]
    mapped = iter(memory)

    class Mapped:
        def __init__(self, allocation: Allocation) -> None:
            del allocation
            self.tensor = next(mapped)

        def close(self) -> None: ...

    segment = ImportedBlocks([Allocation(0, 100), Allocation(300, 50)], Mapped)
    assert segment.locate(310, 40) == (memory[1], 10)
    for offset, nbytes in ((90, 11), (100, 1), (299, 2), (-1, 1), (340, 11)):
        with pytest.raises(LinkError, match="lie in none of its allocations"):
            segment.locate(offset, nbytes)
    with pytest.raises(LinkError, match="overlap"):
        ImportedBlocks([Allocation(0, 100), Allocation(99, 50)], Mapped)
