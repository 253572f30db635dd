"""Fetches a receiver's buckets out of other hosts' memory, ahead of the pipeline that sends them on.

Several reads are under way at once, each into a berth of host memory. A bucket whose holder fails is read again from
another holder of the same bytes, into fresh memory: what was under way may still arrive in the old.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch

from checkpoint_engine.catalog import SegmentEntry
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointEngineError, PeerError, PeerMovedError
from checkpoint_engine.host.p2p_store import ByteRange, P2PStore, Peer
from checkpoint_engine.host.segment import LARGEST_SEGMENT, Segment
from checkpoint_engine.planning.buckets import Bucket, align_up
from checkpoint_engine.planning.peers import PeerPlan, Route
from checkpoint_engine.transfer.trace import Span

READS_AHEAD = 4
_LARGE = 1 << 30
"""Of buckets that large, fewer are fetched at once."""
_TICK_SECONDS = 0.05
_GOODBYE_SECONDS = 1.0
_ROUNDS = 2


@dataclass
class _Berth:
    """Host memory for one bucket."""

    segment: Segment
    start: int
    nbytes: int

    @property
    def address(self) -> int:
        return self.segment.address + self.start

    def view(self, nbytes: int) -> torch.Tensor:
        return self.segment.tensor[self.start : self.start + nbytes]


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

        Raises:
            HostMemoryError: there is no room for the berths.
            CheckpointEngineError: the cause with which the update was cancelled meanwhile.
        """
        self._plan = plan
        self._peers = peers
        self._store = store
        self._device = device
        self._cancel = cancel
        self._keep = keep
        self._ring = ring
        self._local: dict[int, torch.Tensor] = {}
        self._own = [i for i, bucket in enumerate(plan.plan.buckets) if bucket.owner == place]
        for index in self._own:
            view = local(plan.plan.buckets[index], plan.routes[index][0])
            if view is not None:
                self._local[index] = view
        self._away = [index for index in self._own if index not in self._local]
        self._arrivals: dict[int, Future[_Berth]] = {index: Future() for index in self._away}
        self._failed: dict[Peer, PeerError] = {}
        self._spans: list[Span] = []
        self._next = 0
        self._turn = threading.Lock()
        self._closing = threading.Lock()
        self._over = threading.Event()
        self._free: queue.SimpleQueue[_Berth] = queue.SimpleQueue()
        self._memory: list[Segment] = []
        self._endangered: list[Segment] = []
        self._threads: list[threading.Thread] = []
        if self._away:
            try:
                self._prepare()
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
        return arrival.result().view(self._plan.plan.buckets[index].nbytes)

    def release(self, index: int) -> None:
        """Lets its berth be used for another bucket, unless everything is kept."""
        if index in self._arrivals and not self._keep:
            self._free.put(self._arrivals[index].result())

    def spans(self) -> list[Span]:
        """When each bucket was read."""
        return list(self._spans)

    def kept(self) -> tuple[list[Segment], list[SegmentEntry]]:
        """Everything that was fetched, as segments and what is in them; they belong to the caller from now on."""
        held: dict[int, list[tuple[int, int]]] = {}
        segments: dict[int, Segment] = {}
        for index in self._away:
            berth = self._arrivals[index].result()
            segments[berth.segment.address] = berth.segment
            held.setdefault(berth.segment.address, []).append((berth.start, index))
        entries: list[SegmentEntry] = []
        for address, segment in segments.items():
            tensors = [
                tensor.moved(start - self._plan.plan.buckets[index].start)
                for start, index in sorted(held[address])
                for tensor in self._plan.plan.buckets[index].tensors
            ]
            entries.append(SegmentEntry(segment.nbytes, tuple(tensors), segment.address))
        self._memory = [segment for segment in self._memory if segment.address not in segments]
        return list(segments.values()), entries

    def close(self) -> None:
        """Stops; memory in which reads may still land is freed later."""
        with self._closing:
            self._over.set()
        until = time.monotonic() + _GOODBYE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        hanging = any(thread.is_alive() for thread in self._threads)
        memory, self._memory = self._memory, []
        for segment in memory:
            if hanging or segment in self._endangered:
                self._store.retire(segment)
            else:
                segment.close()

    def _prepare(self) -> None:
        nbytes = [align_up(self._plan.plan.buckets[index].nbytes) for index in self._away]
        readers = READS_AHEAD if max(nbytes) < _LARGE else READS_AHEAD // 2
        readers = min(readers, len(nbytes))
        if self._ring is not None:
            berths = [_Berth(self._ring, number * max(nbytes), max(nbytes)) for number in range(readers)]
        else:
            berths = self._berths(nbytes if self._keep else [max(nbytes)] * readers)
        for berth in berths:
            self._free.put(berth)
        for number in range(readers):
            thread = threading.Thread(target=self._fetch_all, name=f"checkpoint-engine-fetch-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _berths(self, sizes: Sequence[int]) -> list[_Berth]:
        """Berths of these sizes, in this order, in as few segments as possible."""
        berths: list[_Berth] = []
        group: list[int] = []
        for nbytes in (*sizes, None):
            if nbytes is None or sum(group) + nbytes > LARGEST_SEGMENT:
                segment = self._segment(sum(group))
                start = 0
                for size in group:
                    berths.append(_Berth(segment, start, size))
                    start += size
                group = []
            if nbytes is not None:
                group.append(nbytes)
        return berths

    def _segment(self, nbytes: int) -> Segment:
        segment = Segment.create(nbytes)
        try:
            segment.touch(0, nbytes)
            self._store.register(segment)
            segment.pin(self._device)
            with self._closing:
                self._check()  # once all is over, nobody would close it
                self._memory.append(segment)
        except BaseException:
            with self._device.active():  # the thread may be one that fetches
                segment.close()
            raise
        return segment

    # -- in the threads ---------------------------------------------------------------------------------------------

    def _fetch_all(self) -> None:
        while True:
            # Berths are given out in the order of the buckets: else a later one could hold the berth of an earlier one.
            with self._turn:
                taken = self._take()
            if taken is None:
                return
            index, berth = taken
            try:
                self._arrivals[index].set_result(self._fetch(index, berth))
            except Exception as error:  # noqa: BLE001 - whatever it is, the update gets it where it asks for the bucket
                self._arrivals[index].set_exception(error)

    def _take(self) -> tuple[int, _Berth] | None:
        while not self._over.is_set() and self._next < len(self._away):
            with contextlib.suppress(queue.Empty):
                berth = self._free.get(timeout=_TICK_SECONDS)
                self._next += 1
                return self._away[self._next - 1], berth
        return None

    def _fetch(self, index: int, berth: _Berth) -> _Berth:
        """Reads a bucket from the first holder that can give it."""
        bucket = self._plan.plan.buckets[index]
        failures: dict[Route, PeerError] = {}
        for _ in range(_ROUNDS):
            for route in self._plan.routes[index]:
                known = self._known_failure(route)
                if known is not None:
                    failures.setdefault(route, known)
                    continue
                begin = time.perf_counter()
                try:
                    self._read(route, berth)
                except PeerError as error:
                    if self._ring is not None:
                        raise
                    failures[route] = error
                    berth = self._replace(berth)
                    self._judge(route)
                    continue
                self._spans.append(Span("read", f"bucket {index}", begin, time.perf_counter(), index, bucket.nbytes))
                return berth
        raise _unreadable(bucket, list(failures.values()))

    def _read(self, route: Route, berth: _Berth) -> None:
        for holder in dict.fromkeys(piece.holder for piece in route):
            ranges = [
                ByteRange(self._address(holder, piece.segment) + piece.start, berth.address + piece.at, piece.nbytes)
                for piece in route
                if piece.holder == holder
            ]
            self._store.read(self._peers[holder], ranges, self._check)

    def _check(self) -> None:
        self._cancel.check()
        if self._over.is_set():
            raise CheckpointEngineError("the update is over")

    def _address(self, holder: int, segment: int) -> int:
        return self._plan.holders[holder].segments[segment].address

    def _known_failure(self, route: Route) -> PeerError | None:
        failed = [self._failed.get(self._peers[piece.holder]) for piece in route]
        return next((error for error in failed if error is not None), None)

    def _judge(self, route: Route) -> None:
        """Finds out which holders of a route are lost for good."""
        for holder in dict.fromkeys(piece.holder for piece in route):
            peer = self._peers[holder]
            try:
                self._store.verify(peer)
            except PeerError as error:
                self._failed.setdefault(peer, error)

    def _replace(self, berth: _Berth) -> _Berth:
        self._endangered.append(berth.segment)
        return _Berth(self._segment(berth.nbytes), 0, berth.nbytes)


def _unreadable(bucket: Bucket, failures: Sequence[PeerError]) -> PeerError:
    first, last = bucket.tensors[0].name, bucket.tensors[-1].name
    named = f"tensor {first!r}" if first == last else f"tensors {first!r} to {last!r}"
    kind = PeerMovedError if any(isinstance(error, PeerMovedError) for error in failures) else PeerError
    nobody = "its only holder" if len(failures) == 1 else f"any of its {len(failures)} holders"
    return kind(f"{named} ({bucket.nbytes} bytes) cannot be read from {nobody}: {'; '.join(map(str, failures))}")
