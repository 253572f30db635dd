"""The pipeline of one rank, on a stand-in for a device whose work is done when the test says so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.planning.buckets import Bucket, BucketPlan
from checkpoint_engine.planning.staging import choose_layout, place_buckets
from checkpoint_engine.transfer.pipeline import BroadcastPipeline
from checkpoint_engine.transfer.report import Progress, StageClock
from checkpoint_engine.transfer.sources import HostSource

SIZE = 256


class Work:
    """Something queued on a stream: over once the test ends it."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        raise AssertionError("the pipeline waits for one thing while others could go on")

    def seconds_since(self, earlier: object) -> float:
        del earlier
        return 0.0


class Stream:
    def __init__(self, done: Callable[[Work], None]) -> None:
        self._queued = done

    def active(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def record(self) -> Work:
        work = Work()
        self._queued(work)
        return work


class Device:
    """Its first stream copies, its second broadcasts; every other event of a stream is an end."""

    def __init__(self) -> None:
        self.copies: list[Work] = []
        self.broadcasts: list[Work] = []
        self._left = [self.copies, self.broadcasts]

    def stream(self) -> Stream:
        return Stream(self._left.pop(0).append)


class Link:
    """A worker that has loaded what the test says."""

    def __init__(self) -> None:
        self.done = -1
        self.told: list[int] = []
        self.loads: dict[int, tuple[float, float]] = {}

    def poll(self) -> None: ...

    def load(self, index: int, offset: int) -> None:
        del offset
        self.told.append(index)


class Gate:
    def __init__(self) -> None:
        self.open = True

    def passed(self, index: int) -> bool:
        del index
        return self.open


class Running:
    """Rank 0 of two, in a thread; buckets belong to the ranks in turn."""

    def __init__(self, buckets: int, *, meet: bool = True) -> None:
        tensors = [TensorEntry(f"t{i}", "U8", (SIZE,), i * SIZE) for i in range(buckets)]
        self.plan = BucketPlan(SIZE, tuple(bucket(i, tensor) for i, tensor in enumerate(tensors)))
        layout = choose_layout(self.plan, 2, 1 << 20)
        assert layout is not None
        self.device, self.link, self.gate, self.cancel = Device(), Link(), Gate(), Cancel()
        staging = torch.empty(layout.nbytes, dtype=torch.uint8)
        parts: Any = {
            "rank": 0,
            "plan": self.plan,
            "ranges": place_buckets(self.plan, layout, 0),
            "staging": type("Staging", (), {"tensor": staging})(),
            "device": self.device,
            "communicator": None,
            "gate": self.gate,
            "source": HostSource(
                lambda index: torch.full((SIZE,), index, dtype=torch.uint8), lambda _: True, self.cancel
            ),
            "cancel": self.cancel,
            "progress": Progress(),
            "clock": StageClock(None),
        }
        self.pipeline = BroadcastPipeline(**parts)
        self.thread = threading.Thread(target=self.pipeline.run, args=(self.link,), daemon=True)
        if meet:
            self.thread.start()

    def copies(self) -> int:
        return len(self.device.copies) // 2

    def broadcasts(self) -> int:
        return len(self.device.broadcasts) // 2

    def settle(self, **expected: int) -> None:
        """Waits until so much is queued; then until nothing more is."""
        deadline = Deadline(5.0)
        while (found := {name: self.counted(name) for name in expected}) != expected:
            deadline.check(f"{expected}, there is {found}, happening")
        threading.Event().wait(0.05)
        assert {name: self.counted(name) for name in expected} == expected

    def counted(self, name: str) -> int:
        return len(self.link.told) if name == "told" else getattr(self, name)()


def bucket(index: int, tensor: TensorEntry) -> Bucket:
    return Bucket(index % 2, 0, index * SIZE, SIZE, (tensor,))


def test_staging_is_filled_before_there_is_a_worker_and_not_twice() -> None:
    waiting = Running(8, meet=False)
    waiting.pipeline.fill()
    filled = waiting.copies()
    assert 0 < filled < 4, "what finds room, of this rank's four"
    assert (waiting.broadcasts(), waiting.link.told) == (0, [])
    waiting.pipeline.fill()
    assert waiting.copies() == filled
    waiting.thread.start()
    waiting.settle(copies=filled, told=0)
    for work in waiting.device.copies:
        work.over = True
    waiting.settle(copies=filled, broadcasts=4, told=0)  # the other rank's two as well
    for work in waiting.device.broadcasts:
        work.over = True
    waiting.link.done = 8


@pytest.fixture
def running() -> Iterator[Running]:
    started = Running(8)
    yield started
    for work in (*started.device.copies, *started.device.broadcasts):
        work.over = True
    started.link.done = len(started.plan.buckets)
    started.thread.join(5)
    assert not started.thread.is_alive()


def end(works: list[Work], count: int) -> None:
    for work in works[: 2 * count]:
        work.over = True


def test_a_bucket_is_broadcast_once_it_is_there_and_loaded_once_it_was(running: Running) -> None:
    running.settle(copies=2, broadcasts=0, told=0)  # two places of its own
    end(running.device.copies, 1)
    running.settle(copies=2, broadcasts=2, told=0)  # its own first, and the other's after it
    end(running.device.broadcasts, 1)
    running.settle(copies=2, broadcasts=2, told=1)


def test_the_next_bucket_is_copied_while_a_broadcast_is_under_way(running: Running) -> None:
    running.settle(copies=2)
    end(running.device.copies, 2)
    end(running.device.broadcasts, 1)
    running.settle(broadcasts=4)
    end(running.device.broadcasts, 1)
    running.settle(told=1)
    running.link.done = 0  # its place is free; the broadcasts after it are still under way
    running.settle(copies=3, broadcasts=4, told=1)


def test_no_broadcast_begins_before_all_ranks_are_ready(running: Running) -> None:
    running.gate.open = False
    running.settle(copies=2)
    end(running.device.copies, 2)
    running.settle(copies=2, broadcasts=0)
    running.gate.open = True
    running.settle(copies=2, broadcasts=4)
