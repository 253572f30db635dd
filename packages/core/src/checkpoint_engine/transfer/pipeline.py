"""The broadcast pipeline: host to device, device to all devices, device to engine.

Every rank walks through the same buckets in the same order. The owner of a bucket copies it to its device ahead of
time, as soon as its source has it and its range of the staging memory is free; then all ranks take part in one
broadcast of it; then each rank's engine worker loads it. While bucket k is loaded, k+1 is broadcast and k+2 comes over
the bus. No stage waits for another: whatever can go on does, so that the bus, the slowest of them, has work to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine.collective import Communicator
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import Device, Event, Staging
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.planning.staging import StagingRange
from checkpoint_engine.transfer.gate import BroadcastGate
from checkpoint_engine.transfer.report import Progress, StageClock
from checkpoint_engine.transfer.sent_sums import SentSums
from checkpoint_engine.transfer.sources import BucketSource
from checkpoint_engine.transfer.trace import DeviceClock, Span, covered
from checkpoint_engine.transfer.worker_link import WorkerLink

__all__ = ["BroadcastPipeline"]

_SHORTEST_PAUSE = 20e-6
_LONGEST_PAUSE = 1e-4
"""Seconds between two looks at what is under way; the longer nothing has happened, the more."""


@dataclass(frozen=True)
class _Span:
    """Work on a stream, between two events."""

    begin: Event
    end: Event

    def seconds(self) -> float:
        return self.end.seconds_since(self.begin)


class BroadcastPipeline:
    """One rank's part in sending all buckets of a plan to all ranks' engine workers."""

    def __init__(
        self,
        *,
        rank: int,
        plan: BucketPlan,
        ranges: Sequence[StagingRange],
        staging: Staging,
        device: Device,
        communicator: Communicator | None,
        gate: BroadcastGate,
        source: BucketSource,
        cancel: Cancel,
        progress: Progress,
        clock: StageClock,
        sums: SentSums | None = None,
    ) -> None:
        """Prepares.

        Args:
            rank: Index of this rank among those that are connected; buckets name their owner by it.
            plan: What is sent, the same on every rank.
            ranges: Where each bucket goes in this rank's staging memory.
            staging: The staging memory, which the engine worker has mapped.
            device: Where the staging memory lies.
            communicator: Connects the ranks; None if there is only one.
            gate: Has the ranks of a host begin broadcasts together.
            source: Gives the bytes of the buckets that this rank owns.
            cancel: Thrown when another rank or the engine has failed.
            progress: Kept up to date.
            clock: Gets the seconds of each stage.
            sums: Gets the bytes of this rank's own buckets, where checksums are wanted.
        """
        self._rank = rank
        self._plan = plan
        self._ranges = ranges
        self._staging = staging.tensor
        self._communicator = communicator
        self._gate = gate
        self._link: WorkerLink | None = None
        self._source = source
        self._cancel = cancel
        self._progress = progress
        self._clock = clock
        self._sums = sums
        self._copies = device.stream()
        self._broadcasts = device.stream()
        self._own = [index for index, bucket in enumerate(plan.buckets) if bucket.owner == rank]
        self._copied: dict[int, _Span] = {}
        self._sent: dict[int, _Span] = {}
        self._next_copy = self._next_broadcast = self._next_load = 0
        self._device_clock = None if clock.trace is None else DeviceClock(self._copies)

    def fill(self) -> None:
        """Begins to copy what finds room in staging: nothing of the engine is touched by that, and it still serves."""
        while self._copy_next():
            self._cancel.check()

    def run(self, link: WorkerLink) -> None:
        """Sends everything and returns once this rank's worker, to which `link` leads, has loaded all of it.

        Raises:
            CheckpointEngineError: this rank's worker failed, another rank did, or the deadline is over.
        """
        self._link = link
        last, pause = len(self._plan.buckets) - 1, _SHORTEST_PAUSE
        while link.done < last:
            self._cancel.check()
            link.poll()
            if any([self._load_next(link), self._copy_next(), self._broadcast_next()]):
                pause = _SHORTEST_PAUSE
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            self._note_progress(link.done + 1)
        self._add_up(link)

    def _copy_next(self) -> bool:
        """Copies this rank's next bucket if its range is free and its bytes are there."""
        if self._next_copy == len(self._own):
            return False
        index = self._own[self._next_copy]
        if not self._is_free(index) or not self._source.ready(index):
            return False
        source = self._source.read(index)
        begin = self._copies.record()
        self._copies.copy(self._view(index), source)
        self._copied[index] = _Span(begin, self._copies.record())
        if self._sums is not None:
            self._sums.take(index, source)
        self._next_copy += 1
        return True

    def _broadcast_next(self) -> bool:
        """Broadcasts the next bucket if all ranks are ready for it."""
        index = self._next_broadcast
        if index == len(self._plan.buckets) or not self._is_here(index) or not self._gate.passed(index):
            return False
        begin = self._broadcasts.record()
        if self._communicator is not None:
            with self._broadcasts.active():
                self._communicator.broadcast(self._view(index), self._plan.buckets[index].owner)
        self._sent[index] = _Span(begin, self._broadcasts.record())
        self._next_broadcast += 1
        return True

    def _load_next(self, link: WorkerLink) -> bool:
        """Hands the next bucket to the engine worker if it has arrived."""
        index = self._next_load
        if index == self._next_broadcast or not self._sent[index].end.done():
            return False
        self._cancel.check()  # a broadcast that was cut off leaves rubbish behind
        if index in self._copied:
            self._source.release(index)
        link.load(index, self._ranges[index].offset)
        self._next_load += 1
        return True

    def _is_here(self, index: int) -> bool:
        """Whether a bucket of this rank's own lies on the device, or there is room for another rank's."""
        if self._plan.buckets[index].owner != self._rank:
            return self._is_free(index)
        return index in self._copied and self._copied[index].end.done()

    def _is_free(self, index: int) -> bool:
        after = self._ranges[index].after
        return after is None or (self._link is not None and self._link.done >= after)

    def _view(self, index: int) -> torch.Tensor:
        range_ = self._ranges[index]
        return self._staging[range_.offset : range_.offset + range_.nbytes]

    def _note_progress(self, done: int) -> None:
        self._progress.bytes_done += sum(b.nbytes for b in self._plan.buckets[self._progress.buckets_done : done])
        self._progress.buckets_done = done

    def _add_up(self, link: WorkerLink) -> None:
        self._clock.add("copy", sum(span.seconds() for span in self._copied.values()))
        fetched = self._source.spans()
        if fetched:
            self._clock.add("fetch", covered(fetched))
        self._clock.add("broadcast", sum(span.seconds() for span in self._sent.values()))
        self._clock.add("load", sum(seconds for _, seconds in link.loads.values()))
        if self._clock.trace is not None and self._device_clock is not None:
            self._clock.trace.spans += [*fetched, *self._trace(self._device_clock), *link.spans(self._plan)]

    def _trace(self, clock: DeviceClock) -> Iterator[Span]:
        def span(lane: str, index: int, begin: float, end: float) -> Span:
            return Span(lane, f"bucket {index}", begin, end, index, self._plan.buckets[index].nbytes)

        for index, copied in self._copied.items():
            yield span("copy", index, clock.at(copied.begin), clock.at(copied.end))
        for index, sent in self._sent.items():
            if self._communicator is not None:
                yield span("broadcast", index, clock.at(sent.begin), clock.at(sent.end))
