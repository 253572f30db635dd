"""The broadcast pipeline: host to device, device to all devices, device to engine.

Every rank walks through the same buckets in the same order. The owner of a bucket copies it to its device ahead of
time, as soon as its source has it; then all ranks take part in one broadcast of it; then each rank's engine worker
loads it. The three stages run on streams of their own, tied together by events, and by the places in the staging memory
becoming free again: while bucket k is loaded, k+1 is broadcast and k+2 comes over the bus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine.collective import Communicator
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import Device, Event, Staging
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.planning.staging import Place
from checkpoint_engine.transfer.report import Progress, StageClock
from checkpoint_engine.transfer.sources import BucketSource
from checkpoint_engine.transfer.trace import DeviceClock, Span, covered
from checkpoint_engine.transfer.worker_link import WorkerLink


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
        places: Sequence[Place],
        staging: Staging,
        device: Device,
        communicator: Communicator | None,
        link: WorkerLink,
        source: BucketSource,
        cancel: Cancel,
        progress: Progress,
        clock: StageClock,
    ) -> None:
        """Prepares.

        Args:
            rank: Place of this rank among those that are connected; buckets name their owner by it.
            plan: What is sent, the same on every rank.
            places: Where each bucket goes in this rank's staging memory.
            staging: The staging memory, which the engine worker has mapped.
            device: Where the staging memory lies.
            communicator: Connects the ranks; None if there is only one.
            link: To this rank's engine worker.
            source: Gives the bytes of the buckets that this rank owns.
            cancel: Thrown when another rank or the engine has failed.
            progress: Kept up to date.
            clock: Gets the seconds of each stage.
        """
        self._rank = rank
        self._plan = plan
        self._places = places
        self._staging = staging.tensor
        self._communicator = communicator
        self._link = link
        self._source = source
        self._cancel = cancel
        self._progress = progress
        self._clock = clock
        self._copies = device.stream()
        self._broadcasts = device.stream()
        self._own = [index for index, bucket in enumerate(plan.buckets) if bucket.owner == rank]
        self._copied: dict[int, _Span] = {}
        self._sent: dict[int, _Span] = {}
        self._next_copy = 0
        self._next_load = 0
        self._device_clock = None if clock.trace is None else DeviceClock(self._copies)

    def run(self) -> None:
        """Sends everything and returns once this rank's worker has loaded all of it.

        Raises:
            CheckpointEngineError: this rank's worker failed, another rank did, or the deadline is over.
        """
        for index in range(len(self._plan.buckets)):
            self._cancel.check()
            self._link.poll()
            self._start_copies()
            self._wait_for_place(index)
            self._start_copies()
            self._wait_for_bytes(index)
            self._broadcast(index)
            # All but the newest bucket: while it is broadcast, the worker loads the ones before.
            self._load_up_to(index - 1)
        last = len(self._plan.buckets) - 1
        self._load_up_to(last)
        self._link.wait_until_done(last)
        self._note_progress()
        self._add_up()

    def _start_copies(self) -> None:
        """Copies this rank's next buckets as far ahead as places are free and bytes are there."""
        while self._next_copy < len(self._own):
            index = self._own[self._next_copy]
            if not self._is_free(index) or not self._source.ready(index):
                return
            self._copy(index)

    def _copy(self, index: int) -> None:
        source = self._source.read(index)
        begin = self._copies.record()
        self._copies.copy(self._view(index), source)
        self._copied[index] = _Span(begin, self._copies.record())
        self._next_copy += 1

    def _wait_for_bytes(self, index: int) -> None:
        """Waits for an own bucket that is still on its way; what came before makes room for it meanwhile."""
        if self._plan.buckets[index].owner == self._rank and index not in self._copied:
            self._load_up_to(index - 1)
            self._copy(index)

    def _wait_for_place(self, index: int) -> None:
        after = self._places[index].after
        if after is not None:
            self._load_up_to(after)
            self._link.wait_until_done(after)

    def _broadcast(self, index: int) -> None:
        if index in self._copied:
            self._broadcasts.wait(self._copied[index].end)
        begin = self._broadcasts.record()
        if self._communicator is not None:
            with self._broadcasts.active():
                self._communicator.broadcast(self._view(index), self._plan.buckets[index].owner)
        self._sent[index] = _Span(begin, self._broadcasts.record())

    def _load_up_to(self, last: int) -> None:
        """Hands buckets to the engine worker, in order, each as soon as it has arrived."""
        while self._next_load <= last:
            index = self._next_load
            self._sent[index].end.synchronize()
            self._cancel.check()  # a broadcast that was cut off leaves rubbish behind
            if index in self._copied:
                self._source.release(index)
            self._link.load(index, self._places[index].offset)
            self._next_load += 1
            self._note_progress()

    def _is_free(self, index: int) -> bool:
        after = self._places[index].after
        return after is None or self._link.done >= after

    def _view(self, index: int) -> torch.Tensor:
        place = self._places[index]
        return self._staging[place.offset : place.offset + place.nbytes]

    def _note_progress(self) -> None:
        done = self._link.done + 1
        self._progress.bytes_done += sum(b.nbytes for b in self._plan.buckets[self._progress.buckets_done : done])
        self._progress.buckets_done = done

    def _add_up(self) -> None:
        self._clock.add("copy", sum(span.seconds() for span in self._copied.values()))
        fetched = self._source.spans()
        if fetched:
            self._clock.add("fetch", covered(fetched))
        self._clock.add("broadcast", sum(span.seconds() for span in self._sent.values()))
        self._clock.add("load", sum(seconds for _, seconds in self._link.loads.values()))
        if self._clock.trace is not None and self._device_clock is not None:
            self._clock.trace.spans += [*fetched, *self._trace(self._device_clock)]

    def _trace(self, clock: DeviceClock) -> Iterator[Span]:
        def span(lane: str, index: int, begin: float, end: float) -> Span:
            return Span(lane, f"bucket {index}", begin, end, index, self._plan.buckets[index].nbytes)

        for index, copied in self._copied.items():
            yield span("copy", index, clock.at(copied.begin), clock.at(copied.end))
        for index, sent in self._sent.items():
            if self._communicator is not None:
                yield span("broadcast", index, clock.at(sent.begin), clock.at(sent.end))
        yield from self._link.spans(self._plan)
