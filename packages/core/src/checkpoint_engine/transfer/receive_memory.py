"""Host memory in which buckets of other hosts arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.source.segment import LARGEST_SEGMENT, Segment

__all__ = ["ReceiveMemory", "ReceiveSlot"]


@dataclass(frozen=True)
class ReceiveSlot:
    """Memory for one bucket at a time."""

    segment: Segment
    start: int
    nbytes: int

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.segment.address + self.start

    def view(self, nbytes: int) -> torch.Tensor:
        """Its first bytes, as 1-D uint8."""
        return self.segment.tensor[self.start : self.start + nbytes]


class ReceiveMemory:
    """Owns the segments of receive slots, until they are handed over or freed; any thread may ask for slots."""

    def __init__(self, store: P2PStore, device: Device, check: Callable[[], None]) -> None:
        """Takes no memory yet.

        Args:
            store: What reads into it.
            device: Where buckets are copied to out of it.
            check: Raises once the update is over.
        """
        self._store = store
        self._device = device
        self._check = check
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._endangered: list[Segment] = []
        """Those in which bytes of a read that failed may still arrive."""
        self._sealed = False

    def slots(self, sizes: Sequence[int]) -> list[ReceiveSlot]:
        """Slots of these sizes, in this order, in as few segments as possible.

        Raises:
            HostMemoryError: there is no room for them.
        """
        slots: list[ReceiveSlot] = []
        for group in _groups(sizes):
            segment, start = self._new_segment(sum(group)), 0
            for nbytes in group:
                slots.append(ReceiveSlot(segment, start, nbytes))
                start += nbytes
        return slots

    def fresh(self, slot: ReceiveSlot) -> ReceiveSlot:
        """Another one of that size, in memory of its own: bytes may still arrive in the old one.

        Raises:
            HostMemoryError: there is no room for it.
            CheckpointEngineError: the update is over.
        """
        with self._lock:
            self._endangered.append(slot.segment)
        return ReceiveSlot(self._new_segment(slot.nbytes), 0, slot.nbytes)

    def hand_over(self, segments: Collection[Segment]) -> None:
        """These belong to the caller from now on."""
        with self._lock:
            self._segments = [segment for segment in self._segments if segment not in segments]

    def seal(self) -> None:
        """No more memory is taken from now on: nobody would free it."""
        with self._lock:
            self._sealed = True

    def free(self, *, reading: bool) -> None:
        """Frees what is left, once nothing can arrive in it any more.

        Args:
            reading: Whether somebody still reads into any of it.
        """
        with self._lock:
            segments, self._segments = self._segments, []
            endangered = list(self._endangered)
        for segment in segments:
            if reading or segment in endangered:
                self._store.retire(segment)
            else:
                segment.close()

    def _new_segment(self, nbytes: int) -> Segment:
        self._check()
        segment = Segment.create(nbytes)
        try:
            segment.touch(0, nbytes)
            self._store.register(segment)
            segment.pin(self._device)
            self._check()
            self._adopt(segment)
        except BaseException:
            with self._device.active():  # the thread may be one that fetches
                segment.close()
            raise
        return segment

    def _adopt(self, segment: Segment) -> None:
        with self._lock:
            if self._sealed:
                raise CheckpointEngineError("the update is over")
            self._segments.append(segment)


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Sizes that fit into one segment together."""
    group: list[int] = []
    for nbytes in sizes:
        if group and sum(group) + nbytes > LARGEST_SEGMENT:
            yield group
            group = []
        group.append(nbytes)
    if group:
        yield group
