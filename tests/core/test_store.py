from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.device import CpuDevice, open_device
from checkpoint_engine.device.cpu import CpuPinned
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import (
    CheckpointFormatError,
    CheckpointStateError,
    DuplicateTensorError,
    HostMemoryError,
)
from checkpoint_engine.source import filling, loader
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import CheckpointStore, Registered

pytestmark = pytest.mark.pure


class CountingPinned(CpuPinned):
    def __init__(self, device: CountingDevice) -> None:
        self.device = device

    def close(self) -> None:
        self.device.pinned -= 1


class CountingDevice(CpuDevice):
    """The CPU, which counts what is pinned and refuses after a number of pins, as a driver may."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__(rank=0)
        self.pinned = 0
        self.pins = 0
        self.most = most
        self.lock = threading.Lock()

    def pin(self, buffer: torch.Tensor) -> CountingPinned:
        with self.lock:
            if self.pins == self.most:
                raise HostMemoryError("the driver refuses")
            self.pins += 1
            self.pinned += 1
        return CountingPinned(self)


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture
def store(device: CountingDevice) -> Iterator[CheckpointStore]:
    gc.collect()
    before = open_descriptors()
    store = CheckpointStore(device)
    yield store
    store.close()
    assert device.pinned == 0
    assert open_descriptors() <= before  # fewer where memory of reads that other tests gave up has gone meanwhile


def open_descriptors() -> int:
    """Descriptors of segments and of checkpoint files that this process has open."""
    names = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    return sum("checkpoint-engine-segment" in name or ".safetensors" in name for name in names)


def shared_memory() -> int:
    """Bytes of shared memory that this process has touched."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0]) * 1024


def contents(registered: Registered) -> dict[str, torch.Tensor]:
    return {
        tensor.name: segment.tensor[tensor.offset : tensor.offset + tensor.nbytes]
        .view(torch_dtype(tensor.dtype))
        .view(tensor.shape)
        .clone()
        for segment, entry in zip(registered.segments, registered.entries, strict=True)
        for tensor in entry.tensors
    }


def tensors(value: int, count: int = 3, size: int = 1000) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((size,), value + i, dtype=torch.int32) for i in range(count)}


def assert_holds(store: CheckpointStore, name: str, expected: dict[str, torch.Tensor]) -> None:
    found = contents(store.get(name))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_files_and_tensors_together_are_one_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    save_file({"head": torch.ones(5)}, tmp_path / "a.safetensors")
    registered = store.register("both", files=[tmp_path / "a.safetensors"], named_tensors=tensors(1))
    assert registered is store.get("both")
    assert_holds(store, "both", tensors(1) | {"head": torch.ones(5)})
    assert registered.nbytes == 3 * 4000 + 20
    assert len(registered.pins) == len(registered.segments) == len(registered.entries)
    assert store.names() == ["both"]


def test_every_segment_is_pinned_once_and_let_go(
    store: CheckpointStore, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 4096)
    registered = store.register("a", named_tensors=tensors(1, count=5))
    assert device.pins == device.pinned == len(registered.segments) == 5
    store.unregister("a")
    assert device.pinned == 0


class PatientDevice(CountingDevice):
    """A driver that pins nothing before it has been asked for two things."""

    def __init__(self) -> None:
        super().__init__()
        self.together = threading.Barrier(2, timeout=10)

    def pin(self, buffer: torch.Tensor) -> CountingPinned:
        self.together.wait()
        return super().pin(buffer)


def test_a_large_checkpoint_has_few_segments_and_a_small_one_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 1 << 20)
    monkeypatch.setattr(filling, "_SMALLEST_TARGET", 1 << 12)
    for nbytes, segments in ((1 << 14, 4), (1 << 16, 16), (1 << 22, 16), (1 << 25, 32)):
        named = {str(index): torch.zeros(nbytes // 64, dtype=torch.uint8) for index in range(64)}
        store = CheckpointStore(CountingDevice())
        assert len(store.register("a", named_tensors=named).segments) == segments
        store.close()


class LookingDevice(CountingDevice):
    """Notes for each pin whether anything lies in the memory already."""

    def __init__(self) -> None:
        super().__init__()
        self.filled: list[bool] = []

    def pin(self, buffer: torch.Tensor) -> CountingPinned:
        self.filled.append(bool(buffer.any()))
        return super().pin(buffer)


@pytest.mark.parametrize("from_gpu", [False, True])
def test_memory_is_pinned_before_a_gpu_writes_to_it(monkeypatch: pytest.MonkeyPatch, from_gpu: bool) -> None:
    # Stands in for tensors of a GPU, which this test has none of.
    monkeypatch.setattr(loader, "comes_from_a_device", lambda _: from_gpu)
    device = LookingDevice()
    store = CheckpointStore(device)
    store.register("a", named_tensors=tensors(1))
    assert device.filled == [not from_gpu]
    assert device.pins == 1
    assert_holds(store, "a", tensors(1))
    store.close()


def test_segments_are_pinned_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 4096)
    store = CheckpointStore(PatientDevice())
    assert len(store.register("a", named_tensors=tensors(1, count=4)).segments) == 4
    store.close()


@pytest.mark.parametrize("empty", [{}, {"x": torch.empty(0, 4)}])
def test_an_empty_checkpoint_is_a_checkpoint(store: CheckpointStore, empty: dict[str, torch.Tensor]) -> None:
    for pool in (False, True):
        assert store.register("empty", named_tensors=empty, pool=pool).nbytes == 0
        assert_holds(store, "empty", empty)
        store.unregister("empty")


def test_a_name_registered_twice_is_refused_and_the_first_stays(store: CheckpointStore) -> None:
    store.register("a", named_tensors=tensors(1))
    with pytest.raises(CheckpointStateError, match="'a' is registered already"):
        store.register("a", named_tensors=tensors(2))
    assert_holds(store, "a", tensors(1))


def test_a_name_that_is_just_being_registered_is_taken_too(
    store: CheckpointStore, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    pin = device.pin

    def slow_pin(buffer: torch.Tensor) -> CountingPinned:
        entered.set()
        assert go_on.wait(10)
        return pin(buffer)

    monkeypatch.setattr(device, "pin", slow_pin)
    first = threading.Thread(target=store.register, args=("a",), kwargs={"named_tensors": tensors(1)})
    first.start()
    assert entered.wait(10)
    with pytest.raises(CheckpointStateError, match="registered already"):
        store.register("a", named_tensors=tensors(2))
    with pytest.raises(CheckpointStateError, match="not registered"):
        store.get("a")
    go_on.set()
    first.join(10)
    assert_holds(store, "a", tensors(1))


def test_an_unknown_name_is_refused_with_those_that_are_known(store: CheckpointStore) -> None:
    store.register("a")
    store.register("b")
    with pytest.raises(CheckpointStateError, match="'c' is not registered; registered are: 'a', 'b'"):
        store.get("c")
    for call in (store.unregister, lambda name: store.use(name).__enter__()):
        with pytest.raises(CheckpointStateError):
            call("c")


def test_a_tensor_in_a_file_and_in_memory_is_taken_once_if_it_is_the_same(
    store: CheckpointStore, tmp_path: Path
) -> None:
    held = {"x": torch.arange(6).to(torch.bfloat16).view(2, 3).t(), "scalar": torch.tensor(3)}
    save_file({**{name: tensor.contiguous() for name, tensor in held.items()}, "y": torch.ones(2)}, tmp_path / "a")
    store.register("a", files=[tmp_path / "a"], named_tensors=held)
    assert_holds(store, "a", {**held, "y": torch.ones(2)})
    assert sum(len(entry.tensors) for entry in store.get("a").entries) == 3
    held["x"][0, 0] = -1
    with pytest.raises(DuplicateTensorError, match=r"'x' is in .* with other bytes"):
        store.register("b", files=[tmp_path / "a"], named_tensors=held)


def test_a_failure_frees_everything_and_leaves_the_others(store: CheckpointStore, tmp_path: Path) -> None:
    store.register("a", named_tensors=tensors(1))
    taken = open_descriptors()
    save_file({"x": torch.ones(5)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointFormatError):
        store.register("b", files=[tmp_path / "good.safetensors", tmp_path / "bad.safetensors"])
    with pytest.raises(DuplicateTensorError, match=r"'x' is in .*good\.safetensors and again among the named tensors"):
        store.register("b", files=[tmp_path / "good.safetensors"], named_tensors={"x": torch.ones(1)})
    assert open_descriptors() == taken
    assert store.names() == ["a"]
    assert_holds(store, "a", tensors(1))
    store.register("b", files=[tmp_path / "good.safetensors"])


def test_a_driver_that_refuses_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 4096)
    device = CountingDevice(most=3)
    store = CheckpointStore(device)
    before = shared_memory()
    with pytest.raises(HostMemoryError, match="the driver refuses"):
        store.register("a", named_tensors=tensors(1, count=8, size=1 << 18))
    assert device.pinned == 0
    assert shared_memory() - before < 1 << 20
    assert store.names() == []


def test_unregistering_while_in_use_is_refused(store: CheckpointStore) -> None:
    store.register("a", named_tensors=tensors(1))
    with store.use("a") as outer, store.use("a") as inner:
        assert outer is inner
        for force in (False, True):
            with pytest.raises(CheckpointStateError, match="'a' is being sent"):
                store.unregister("a", force=force)
        assert_holds(store, "a", tensors(1))
    store.unregister("a")
    assert store.names() == []


def test_use_ends_with_an_error_too(store: CheckpointStore) -> None:
    store.register("a", named_tensors=tensors(1))
    with pytest.raises(RuntimeError), store.use("a"):
        raise RuntimeError("the update failed")
    store.unregister("a")


def test_a_pool_serves_other_shapes_without_new_memory(
    store: CheckpointStore, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 3 * 4096)
    store.register("a", named_tensors=tensors(1, count=7), pool=True)
    addresses = {segment.address for segment in store.get("a").segments}
    store.unregister("a")
    assert device.pinned == device.pins == 3
    store.register("b", named_tensors=tensors(5, count=20, size=300), pool=True)
    assert {segment.address for segment in store.get("b").segments} <= addresses
    assert device.pins == 3
    assert_holds(store, "b", tensors(5, count=20, size=300))
    # What is left over is still there for a third one, be it one large tensor or many small ones.
    store.unregister("b")
    third = tensors(9, count=2, size=2000) | {f"tiny{i}": torch.full((3,), float(i)) for i in range(10)}
    store.register("c", named_tensors=third, pool=True)
    assert {segment.address for segment in store.get("c").segments} <= addresses
    assert device.pins == device.pinned == 3
    assert_holds(store, "c", third)


@pytest.mark.parametrize("sizes", [(900, 900, 900), (500, 3000, 700, 2000, 10)])
def test_the_same_tensors_again_lie_where_they_lay(
    store: CheckpointStore, device: CountingDevice, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 4096)

    def step(number: int) -> dict[str, torch.Tensor]:
        return {f"t{index}": torch.full((size,), 100.0 * number + index) for index, size in enumerate(sizes)}

    def offsets() -> list[tuple[int, object]]:
        registered = store.get("step")
        return list(zip((segment.address for segment in registered.segments), registered.entries, strict=True))

    store.register("another", named_tensors=tensors(1, count=5, size=900), pool=True)
    found: list[list[tuple[int, object]]] = []
    for number in range(4):
        store.register("step", named_tensors=step(number), pool=True)
        assert_holds(store, "step", step(number))
        found.append(offsets())
        if number == 1:
            store.unregister("another")  # its segments are of no interest to those that have some of their own
        store.unregister("step")
    assert found == [found[0]] * 4
    assert device.pins == device.pinned


def test_a_pool_grows_where_it_does_not_suffice(store: CheckpointStore, device: CountingDevice) -> None:
    store.register("a", named_tensors=tensors(1, count=2, size=100), pool=True)
    store.unregister("a")
    bigger = {"small": torch.ones(50), "large": torch.ones(10_000), "last": torch.ones(40)}
    store.register("b", named_tensors=bigger, pool=True)
    assert_holds(store, "b", bigger)
    assert device.pins == 2


def test_two_pooled_checkpoints_at_once_do_not_share(store: CheckpointStore) -> None:
    store.register("a", named_tensors=tensors(1), pool=True)
    store.register("b", named_tensors=tensors(10), pool=True)
    assert_holds(store, "a", tensors(1))
    assert_holds(store, "b", tensors(10))


def test_force_frees_the_pool(store: CheckpointStore, device: CountingDevice) -> None:
    store.register("a", named_tensors=tensors(1), pool=True)
    store.unregister("a", force=True)
    assert device.pinned == 0


def test_an_idle_pool_gives_way_when_memory_is_short(
    store: CheckpointStore, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register("a", named_tensors=tensors(1, count=1), pool=True)
    store.unregister("a")
    create = Segment.create

    def create_once_the_pool_is_empty(nbytes: int) -> Segment:
        if device.pinned:
            raise HostMemoryError("no memory")
        return create(nbytes)

    monkeypatch.setattr(Segment, "create", create_once_the_pool_is_empty)
    store.register("b", named_tensors=tensors(1, count=1, size=100_000), pool=True)
    assert_holds(store, "b", tensors(1, count=1, size=100_000))


def test_a_file_in_place_stays_when_its_checkpoint_goes(store: CheckpointStore, on_tmpfs: Path) -> None:
    path = on_tmpfs / "a.safetensors"
    save_file(tensors(1), path)
    content = path.read_bytes()
    for pool in (False, True):
        store.register("a", files=[path], pool=pool)
        assert store.get("a").segments[0].file == path
        store.unregister("a", force=True)
    assert path.read_bytes() == content


def test_a_file_in_place_that_was_truncated_is_refused_before_use(store: CheckpointStore, on_tmpfs: Path) -> None:
    path = on_tmpfs / "a.safetensors"
    save_file(tensors(1), path)
    store.register("a", files=[path])
    os.truncate(path, 100)
    with pytest.raises(CheckpointFormatError, match="truncated to 100 bytes"), store.use("a"):
        pass
    store.unregister("a")


def test_the_real_device_pins() -> None:
    store = CheckpointStore(open_device("cpu"))
    assert len(store.register("a", named_tensors=tensors(1)).pins) == 1
    store.close()
    assert store.names() == []


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_registered() -> None:
    store = CheckpointStore(open_device("cuda"))
    held = {name: tensor.cuda() for name, tensor in tensors(1).items()}
    store.register("a", named_tensors={**held, "strided": held["layer.0"].view(10, -1).t()})
    assert_holds(store, "a", {**tensors(1), "strided": tensors(1)["layer.0"].view(10, -1).t()})
    store.close()


@pytest.mark.gpu
def test_a_gpu_copies_from_a_registered_checkpoint() -> None:
    store = CheckpointStore(open_device("cuda"))
    registered = store.register("a", named_tensors=tensors(1))
    assert registered.segments[0].tensor.is_pinned()
    assert torch.equal(registered.segments[0].tensor.cuda().cpu(), registered.segments[0].tensor)
    store.close()
