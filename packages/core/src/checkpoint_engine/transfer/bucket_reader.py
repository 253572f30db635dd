"""Reads single buckets out of other hosts' memory, from whichever of their holders can be read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from checkpoint_engine.errors import PeerError, PeerMovedError
from checkpoint_engine.p2p.store import ByteRange, P2PStore, Peer
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.planning.peers import PeerPlan, Route
from checkpoint_engine.source.word_sums import sum_of_words
from checkpoint_engine.transfer.receive_memory import ReceiveMemory, ReceiveSlot
from checkpoint_engine.transfer.trace import Span

__all__ = ["Arrival", "BucketReader"]

_ROUNDS = 2


@dataclass(frozen=True)
class Arrival:
    """A bucket that was read."""

    slot: ReceiveSlot
    span: Span


class _LostPeers:
    """Peers that no thread need try again, and why."""

    def __init__(self) -> None:
        self._errors: dict[Peer, PeerError] = {}
        self._lock = threading.Lock()

    def add(self, peer: Peer, error: PeerError) -> None:
        """The first cause counts."""
        with self._lock:
            self._errors.setdefault(peer, error)

    def first_of(self, peers: Iterable[Peer]) -> PeerError | None:
        """Why the first of them that is lost is so; None if none is."""
        with self._lock:
            return next((self._errors[peer] for peer in peers if peer in self._errors), None)


class BucketReader:
    """Reads single buckets; any number of threads may use it at once."""

    def __init__(
        self,
        plan: PeerPlan,
        peers: Sequence[Peer],
        store: P2PStore,
        memory: ReceiveMemory | None,
        check: Callable[[], None],
    ) -> None:
        """Takes where fresh memory comes from for a second attempt; None if there is none, and so no second attempt."""
        self._plan = plan
        self._peers = peers
        self._store = store
        self._memory = memory
        self._check = check
        self._lost = _LostPeers()

    def fetch(self, index: int, slot: ReceiveSlot) -> Arrival:
        """Reads a bucket from the first holder that can give it, into that slot or a fresh one.

        Raises:
            PeerError: no holder could be read.
            CheckpointEngineError: the update is over.
        """
        bucket = self._plan.plan.buckets[index]
        failures: dict[Route, PeerError] = {}
        for route in self._plan.routes[index] * _ROUNDS:
            lost = self._lost.first_of(self._peers[piece.holder] for piece in route)
            if lost is not None:
                failures.setdefault(route, lost)
                continue
            begin = time.perf_counter()
            try:
                self._read(route, slot)
                _compare(bucket, route, slot)
            except PeerError as error:
                if self._memory is None:
                    raise
                failures[route] = error
                slot = self._memory.fresh(slot)
                self._judge(route)
                continue
            return Arrival(slot, Span("read", f"bucket {index}", begin, time.perf_counter(), index, bucket.nbytes))
        raise _unreadable(bucket, list(failures.values()))

    def _read(self, route: Route, slot: ReceiveSlot) -> None:
        for holder in _holders(route):
            segments = self._plan.holders[holder].segments
            ranges = [
                ByteRange(segments[piece.segment].address + piece.start, slot.address + piece.at, piece.nbytes)
                for piece in route
                if piece.holder == holder
            ]
            self._store.read(self._peers[holder], ranges, self._check)

    def _judge(self, route: Route) -> None:
        """Finds out which holders of a route are lost for good."""
        for holder in _holders(route):
            peer = self._peers[holder]
            try:
                self._store.judge(peer)
            except PeerError as error:
                self._lost.add(peer, error)


def _holders(route: Route) -> list[int]:
    """Each once, in order."""
    return list(dict.fromkeys(piece.holder for piece in route))


def _compare(bucket: Bucket, route: Route, slot: ReceiveSlot) -> None:
    """Raises unless what was read is what was registered, of the tensors whose holder has taken checksums."""
    data = slot.view(bucket.nbytes)
    for tensor in bucket.tensors:
        begin = tensor.offset - bucket.start
        if tensor.checksum is None or not _covers(route, begin, begin + tensor.nbytes):
            continue
        if int(sum_of_words(data[begin : begin + tensor.nbytes])) != tensor.checksum:
            raise PeerError(
                f"tensor {tensor.name!r} did not arrive as it was registered: its checksum differs. The network or a "
                "host's memory is faulty"
            )


def _covers(route: Route, begin: int, end: int) -> bool:
    """Whether those bytes of the bucket are all read."""
    for piece in sorted(route, key=lambda piece: piece.at):
        if piece.at <= begin < piece.at + piece.nbytes:
            begin = piece.at + piece.nbytes
    return begin >= end


def _unreadable(bucket: Bucket, failures: Sequence[PeerError]) -> PeerError:
    first, last = bucket.tensors[0].name, bucket.tensors[-1].name
    named = f"tensor {first!r}" if first == last else f"tensors {first!r} to {last!r}"
    kind = PeerMovedError if any(isinstance(error, PeerMovedError) for error in failures) else PeerError
    nobody = "its only holder" if len(failures) == 1 else f"any of its {len(failures)} holders"
    return kind(f"{named} ({bucket.nbytes} bytes) cannot be read from {nobody}: {'; '.join(map(str, failures))}")
