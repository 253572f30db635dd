"""Segments that checkpoints leave behind, for those that come."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.errors import HostMemoryError
from checkpoint_engine.source.segment import Segment

__all__ = ["SegmentPool"]

_Kind = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""


@dataclass(frozen=True, eq=False)
class _Idle:
    segment: Segment
    first: _Kind


class SegmentPool:
    """Segments that a checkpoint left behind, still pinned, for the next one whatever its shapes.

    The same tensors again lie where they lay: whoever has these segments mapped and registered, or has worked out what
    to copy out of them, has nothing to do anew.
    """

    def __init__(self) -> None:
        self._idle: list[_Idle] = []
        """In the order in which they came back."""
        self._lock = threading.Lock()

    @property
    def spare(self) -> int:
        """Bytes that lie idle."""
        with self._lock:
            return sum(idle.segment.nbytes for idle in self._idle)

    def take(self, smallest: int, wanted: int, first: TensorEntry) -> Segment:
        """The idle segment that began with the same tensor, or else the largest; if none is large enough, a new one.

        Raises:
            HostMemoryError: memory is short even without the idle segments.
        """
        with self._lock:
            fitting = [idle for idle in self._idle if wanted and idle.segment.nbytes >= smallest]
            if fitting:
                # Of several that are alike, the last: it came back together with those that follow it.
                best = max(reversed(fitting), key=lambda idle: (idle.first == _kind(first), idle.segment.nbytes))
                self._idle.remove(best)
                return best.segment
        try:
            return Segment.create(max(smallest, wanted))
        except HostMemoryError:
            if not self.spare:
                raise
            self.drop_idle()
            return Segment.create(max(smallest, wanted))

    def give_back(self, segment: Segment, entry: SegmentEntry) -> None:
        """Keeps a segment for later; `entry` says what lay in it."""
        if not segment.nbytes:
            segment.close()
            return
        with self._lock:
            self._idle.append(_Idle(segment, _kind(entry.tensors[0])))

    def drop_idle(self) -> None:
        """Frees what lies idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.segment.close()


def _kind(tensor: TensorEntry) -> _Kind:
    return tensor.name, tensor.dtype, tensor.shape
