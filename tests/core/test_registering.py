"""Registering in the background: what is needed first can be used meanwhile, and nothing stays registered."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import CpuDevice, Pinned, open_device
from checkpoint_engine.device import registering as module
from checkpoint_engine.device.registering import Registration
from checkpoint_engine.device.segments import MappedSegments
from checkpoint_engine.errors import DeadlineError, HostMemoryError, UpdateError
from checkpoint_engine.source import filling
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.exports import RING, ExportedSegments, export_segments
from tests.core.cluster import Cluster, check
from tests.waiting import within


class SlowDevice(CpuDevice):
    """Stands in for a GPU whose driver registers a block of n bytes only once gate n is open, or refuses."""

    def __init__(self, *, refuses: int = -1) -> None:
        super().__init__(0)
        self.gates = [threading.Event() for _ in range(10)]
        self.begun: list[int] = []
        self.held: set[int] = set()
        self._refuses = refuses

    def pin(self, buffer: torch.Tensor) -> Pinned:  # pyright: ignore[reportIncompatibleMethodOverride]
        number = buffer.numel()
        self.begun.append(number)
        if number == self._refuses:
            raise HostMemoryError(f"no room for block {number}")
        assert self.gates[number].wait(20)
        self.held.add(number)
        return SlowPinned(lambda: self.held.remove(number))


class SlowPinned:
    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close


def blocks(count: int) -> list[torch.Tensor]:
    return [torch.empty(number, dtype=torch.uint8) for number in range(count)]


def test_a_block_is_ready_while_others_are_not() -> None:
    device = SlowDevice()
    registration = Registration(device, blocks(3))
    device.gates[0].set()
    registration.wait(0, Deadline(10))
    assert device.held == {0}
    with pytest.raises(DeadlineError, match=r"segment 2 .* within 0\.05 s; --method broadcast"):
        registration.wait(2, Deadline(0.05))
    for gate in device.gates:
        gate.set()
    registration.wait(2, Deadline(10))
    registration.close()
    assert not device.held


def test_a_refusal_comes_where_the_block_is_needed() -> None:
    device = SlowDevice(refuses=1)
    for gate in device.gates:
        gate.set()
    registration = Registration(device, blocks(3))
    registration.wait(0, Deadline(10))
    registration.wait(2, Deadline(10))
    with pytest.raises(HostMemoryError, match="no room for block 1"):
        registration.wait(1, Deadline(10))
    registration.close()
    assert not device.held


def test_closing_waits_for_what_has_begun_and_begins_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_THREADS", 2)
    device = SlowDevice()
    registration = Registration(device, blocks(6))
    assert within(10, lambda: len(device.begun) == 2)
    closing = threading.Thread(target=registration.close)
    closing.start()
    time.sleep(0.1)
    assert closing.is_alive()
    for gate in device.gates:
        gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert sorted(device.begun) == [0, 1]
    assert not device.held


def test_what_the_driver_ends_too_late_is_let_go_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.05)
    let_go = threading.Event()
    device = SlowDevice()
    registration = Registration(device, blocks(1))
    assert within(10, lambda: device.begun == [0])
    monkeypatch.setattr(device, "held", Noting(let_go))
    registration.close()
    assert "still registers 1 segments after 0.05 s" in caplog.text
    assert not let_go.is_set()
    device.gates[0].set()
    assert let_go.wait(10)


class Noting(set[int]):
    """A set that says when something was removed."""

    def __init__(self, removed: threading.Event) -> None:
        super().__init__()
        self._removed = removed

    def remove(self, element: int) -> None:
        super().remove(element)
        self._removed.set()


# -- in updates -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(
    monkeypatch: pytest.MonkeyPatch, set_bucket_size: Callable[[int], None], clusters: Callable[[int], Cluster]
) -> Cluster:
    """Two ranks; each holds five segments, and a bucket is a tensor."""
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 1 << 14)
    set_bucket_size(16 << 10)
    cluster = clusters(2)
    cluster.register("v1", noise())
    return cluster


def noise() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"t{i}": torch.randint(0, 256, (16000,), generator=generator, dtype=torch.uint8) for i in range(10)}


class Pins:
    """Takes the place of the registering that the workers do; the ranks have done theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.refuse = False
        self.begun = 0
        self.held = 0
        self._lock = threading.Lock()
        monkeypatch.setattr(CpuDevice, "pin", lambda _, buffer: self.pin(buffer))

    def pin(self, buffer: torch.Tensor) -> Pinned:
        del buffer
        with self._lock:
            self.begun += 1
            late = self.begun > 8
        if late and self.refuse:
            raise HostMemoryError("the driver is told to refuse")
        assert not late or self.open.wait(20)
        self._count(1)
        return SlowPinned(lambda: self._count(-1))

    def _count(self, change: int) -> None:
        with self._lock:
            self.held += change


def mapped_segments() -> int:
    gc.collect()
    return sum("checkpoint-engine-segment" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_the_first_update_begins_before_everything_is_registered(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mapped_segments()
    pins = Pins(monkeypatch)
    for recorder in pair.recorders:
        recorder.on_load = pins.open.set  # what is registered last waits for the first bucket to be loaded
    check(pair.update("v1", method="direct"))
    assert pins.held == 20
    for recorder in pair.recorders:
        assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in noise().items())
    check(pair.update("v1", method="direct"))
    assert pins.held == pins.begun == 20, "registered once"
    for server in pair.servers:
        server.unregister_checkpoint("v1", force=True)
    assert within(5, lambda: (pins.held, mapped_segments()) == (0, own - 10)), "the ranks' ten are gone as well"


def test_a_driver_that_refuses_fails_the_update_and_leaves_nothing(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mapped_segments()
    pins = Pins(monkeypatch)
    pins.refuse = True
    errors = pair.update("v1", method="direct")
    assert all(isinstance(error, UpdateError) for error in errors)
    assert all("HostMemoryError" in str(error) or "told to refuse" in str(error) for error in errors)
    del errors
    pair.received.clear()
    assert within(5, lambda: (pins.held, mapped_segments()) == (0, own))
    check(pair.update("v1"))


def test_a_failure_while_it_is_under_way_leaves_nothing(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    own = mapped_segments()
    pins = Pins(monkeypatch)
    threading.Timer(1.0, pins.open.set).start()
    pair.recorders[0].fail_in = "load"
    assert all(isinstance(error, UpdateError) for error in pair.update("v1", method="direct"))
    pair.received.clear()
    assert within(5, lambda: (pins.held, mapped_segments()) == (0, own))


def test_segments_are_lent_in_the_order_in_which_they_are_needed() -> None:
    segments = [[Segment.create(4096 * (10 * rank + index + 1)) for index in range(2 + rank)] for rank in range(2)]
    ring = Segment.create(4096)
    offers = {rank: export_segments(mine) for rank, mine in enumerate(segments)} | {RING: export_segments([ring])}
    lent = ExportedSegments(offers)
    assert [size // 4096 for size in lent.memory.sizes] == [1, 1, 11, 2, 12, 13]  # type: ignore[union-attr]
    assert [lent.number(*place) for place in ((RING, 0), (0, 0), (1, 0), (0, 1), (1, 1), (1, 2))] == [0, 1, 2, 3, 4, 5]
    lent.close()
    for segment in [*segments[0], *segments[1], ring]:
        segment.close()


@pytest.mark.gpu
def test_a_gpu_copies_out_of_segments_that_are_registered_in_the_background() -> None:
    device = open_device("cuda")
    segments = [Segment.create(64 << 20) for _ in range(6)]
    for number, segment in enumerate(segments):
        segment.tensor.fill_(number)
    lent = ExportedSegments({0: export_segments(segments)})
    for _ in range(2):
        mapped = device.map(lent.memory, tuple(os.dup(descriptor) for descriptor in lent.descriptors))
        assert isinstance(mapped, MappedSegments)
        parts = [mapped.part(number, Deadline(20)) for number in range(len(segments))]
        assert all(part.is_pinned() for part in parts)
        assert [part.to(device.torch_device).unique().tolist() for part in parts] == [[n] for n in range(6)]
        mapped.close()
        assert not any(part.is_pinned() for part in parts)
        del mapped, parts
    lent.close()
    for segment in segments:
        segment.close()
    assert mapped_segments() == 0
