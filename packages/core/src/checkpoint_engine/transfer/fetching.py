"""Fetches a receiver's buckets out of other hosts' memory, ahead of the pipeline that sends them on.

Several reads are under way at once, each into a receive slot of host memory. A bucket whose holder fails is read again
from another holder of the same bytes, into fresh memory: what was under way may still arrive in the old.

What threads share is owned by one object each, which has a lock of its own: who is next (`_Turns`), what is known of
peers (`BucketReader`), and memory (`ReceiveMemory`). What a thread has read it hands over as a future.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait

import torch

from checkpoint_engine import limits
from checkpoint_engine.catalog import SegmentEntry
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.p2p.store import P2PStore, Peer
from checkpoint_engine.planning.buckets import Bucket, align_up
from checkpoint_engine.planning.peers import PeerPlan, Route
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.bucket_reader import Arrival, BucketReader
from checkpoint_engine.transfer.receive_memory import ReceiveMemory, ReceiveSlot
from checkpoint_engine.transfer.trace import Span

__all__ = ["READS_AHEAD", "PeerSource"]

READS_AHEAD = 4
_LARGE = 1 << 30
"""Of buckets that large, fewer are fetched at once."""
_TICK_SECONDS = 0.05


class _Turns:
    """Whose turn it is: gives free slots to buckets, in the order of the buckets.

    In another order a later bucket could hold the slot of an earlier one, which the pipeline waits for.
    """

    def __init__(self, buckets: Iterable[int], slots: Iterable[ReceiveSlot]) -> None:
        self._buckets = deque(buckets)
        self._slots = deque(slots)
        self._over = False
        self._changed = threading.Condition()

    def take(self) -> tuple[int, ReceiveSlot] | None:
        """The next bucket and its slot, once one is free; None after the last bucket, and once all is over."""
        with self._changed:
            while self._buckets and not self._over:
                if self._slots:
                    return self._buckets.popleft(), self._slots.popleft()
                self._changed.wait(_TICK_SECONDS)
        return None

    def put_back(self, slot: ReceiveSlot) -> None:
        """It may be used for another bucket."""
        with self._changed:
            self._slots.append(slot)
            self._changed.notify()

    def end(self) -> None:
        """Nothing more is given out."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


class PeerSource:
    """One receiver's buckets, read from peers."""

    def __init__(
        self,
        plan: PeerPlan,
        place: int,
        *,
        peers: Sequence[Peer],
        local: Callable[[Bucket, Route], torch.Tensor | None],
        store: P2PStore,
        device: Device,
        cancel: Cancel,
        keep: bool,
        ring: Segment | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        """Starts to fetch.

        Args:
            plan: The same on all ranks.
            place: Of this rank among the receivers.
            peers: How each of the plan's holders is reached.
            local: Gives a bucket that lies in this process's own memory, or None.
            store: Reads.
            device: Where buckets are copied to later.
            cancel: Thrown when the update has failed.
            keep: Whether everything that is fetched stays in host memory, for `kept`.
            ring: Registered memory of the caller's that everything must go through; a bucket that does not arrive at
                the first attempt is then lost, since there is no fresh memory for a second.
            order: Of all that is fetched; that of the plan if None.

        Raises:
            HostMemoryError: there is no room for the slots.
            CheckpointEngineError: the cause with which the update was cancelled meanwhile.
        """
        self._buckets = plan.plan.buckets
        self._cancel = cancel
        self._keep = keep
        self._local: dict[int, torch.Tensor] = {}
        self._arrivals: dict[int, Future[Arrival]] = {}
        for index in range(len(self._buckets)) if order is None else order:
            bucket = self._buckets[index]
            if bucket.owner == place:
                view = local(bucket, plan.routes[index][0])
                if view is None:
                    self._arrivals[index] = Future()
                else:
                    self._local[index] = view
        self._over = threading.Event()
        self._memory = ReceiveMemory(store, device, self._check)
        self._turns = _Turns((), ())
        self._threads: list[threading.Thread] = []
        reader = BucketReader(plan, peers, store, self._memory if ring is None else None, self._check)
        if self._arrivals:
            try:
                self._start(reader, ring)
            except BaseException:
                self.close()
                raise

    def ready(self, index: int) -> bool:
        """Whether the bucket has arrived, or failed to."""
        return index in self._local or self._arrivals[index].done()

    def read(self, index: int) -> torch.Tensor:
        """The bucket, once it has arrived.

        Raises:
            PeerError: no holder could be read.
            CheckpointEngineError: the cause with which the update was cancelled.
        """
        if index in self._local:
            return self._local[index]
        arrival = self._arrivals[index]
        while not arrival.done():
            self._cancel.check()
            wait([arrival], _TICK_SECONDS)
        return arrival.result().slot.view(self._buckets[index].nbytes)

    def release(self, index: int) -> None:
        """Lets its slot be used for another bucket, unless everything is kept."""
        if index in self._arrivals and not self._keep:
            self._turns.put_back(self._arrivals[index].result().slot)

    def spans(self) -> list[Span]:
        """When each bucket was read."""
        arrived = [each for each in self._arrivals.values() if each.done() and each.exception() is None]
        return [each.result().span for each in arrived]

    def kept(self) -> tuple[list[Segment], list[SegmentEntry]]:
        """Everything that was fetched, as segments and what is in them; they belong to the caller from now on."""
        held: dict[int, list[tuple[int, int]]] = {}
        segments: dict[int, Segment] = {}
        for index, arrival in self._arrivals.items():
            slot = arrival.result().slot
            segments[slot.segment.address] = slot.segment
            held.setdefault(slot.segment.address, []).append((slot.start, index))
        entries: list[SegmentEntry] = []
        for address, segment in segments.items():
            tensors = [
                tensor.moved(start - self._buckets[index].start)
                for start, index in sorted(held[address])
                for tensor in self._buckets[index].tensors
            ]
            entries.append(SegmentEntry(segment.nbytes, tuple(tensors), segment.address))
        self._memory.hand_over(segments.values())
        return list(segments.values()), entries

    def close(self) -> None:
        """Stops; memory in which reads may still land is freed later."""
        self._over.set()
        self._memory.seal()
        self._turns.end()
        until = time.monotonic() + limits.FETCH_GOODBYE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._memory.free(reading=any(thread.is_alive() for thread in self._threads))

    def _start(self, reader: BucketReader, ring: Segment | None) -> None:
        nbytes = [align_up(self._buckets[index].nbytes) for index in self._arrivals]
        largest = max(nbytes)
        count = min(READS_AHEAD if largest < _LARGE else READS_AHEAD // 2, len(nbytes))
        if ring is not None:
            slots = [ReceiveSlot(ring, number * largest, largest) for number in range(count)]
        else:
            slots = self._memory.slots(nbytes if self._keep else [largest] * count)
        self._turns = _Turns(self._arrivals, slots)
        for number in range(count):
            thread = threading.Thread(
                target=self._fetch_all, args=(reader,), name=f"checkpoint-engine-fetch-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _fetch_all(self, reader: BucketReader) -> None:
        """What each thread does."""
        while (taken := self._turns.take()) is not None:
            index, slot = taken
            try:
                self._arrivals[index].set_result(reader.fetch(index, slot))
            except Exception as error:  # noqa: BLE001 - whatever it is, the update gets it where it asks for the bucket
                self._arrivals[index].set_exception(error)

    def _check(self) -> None:
        self._cancel.check()
        if self._over.is_set():
            raise CheckpointEngineError("the update is over")
