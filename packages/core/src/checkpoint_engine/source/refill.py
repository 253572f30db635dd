"""New bytes for segments that keep their tensors' places, brought while the first of them are being sent already."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError

import torch

from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.host.numa import taking_turns
from checkpoint_engine.source.copying import FillPiece, pieces_into
from checkpoint_engine.source.filling import workers
from checkpoint_engine.source.refill_plan import RefillPlan
from checkpoint_engine.source.segment import Segment

__all__ = ["Refill"]

_DOWNLOADERS = 2
"""While one waits for its bytes, the other has told the device of the next: the bus never idles."""
_TICK_SECONDS = 0.05


class Refill:
    """Copies that run by themselves, in the order in which an update sends what they bring."""

    def __init__(self, plan: RefillPlan, segments: Sequence[Segment], sources: Sequence[torch.Tensor]) -> None:
        """Starts.

        Args:
            plan: Of these segments.
            segments: Pinned, and touched.
            sources: The new values, as the plan gave them; they stay as they are meanwhile.
        """
        self.plan = plan
        self._ends: list[tuple[int, int]] = []
        """Segment and end of each piece; ascending."""
        pieces: list[FillPiece] = []
        first = 0
        for number, (segment, stretches) in enumerate(zip(segments, plan.stretches(sources), strict=True)):
            tensors = plan.entries[number].tensors
            mine = sources[first : first + len(tensors)]
            first += len(tensors)
            found = list(pieces_into(segment, tensors, mine, stretches))
            self._ends += [(number, piece.end) for piece in found]
            pieces += found
        self._pools = (ThreadPoolExecutor(_DOWNLOADERS, "checkpoint-engine-host", taking_turns()), workers())
        downloads, copies = self._pools
        self._futures = [(downloads if piece.from_device else copies).submit(piece.run) for piece in pieces]
        self._done = 0
        """So many pieces, counted from the first, are there."""
        self._lock = threading.Lock()
        for pool in self._pools:
            pool.shutdown(wait=False)

    def has(self, segment: int, end: int) -> bool:
        """Whether everything up to that byte of that segment is there.

        Raises:
            CheckpointEngineError: it will never be.
        """
        needed = min(bisect.bisect_left(self._ends, (segment, end)) + 1, len(self._futures))
        with self._lock:
            while self._done < needed and self._futures[self._done].done():
                if self._futures[self._done].cancelled():
                    raise CheckpointStateError(
                        "what was on its way into this checkpoint was given up; register it again"
                    )
                self._futures[self._done].result()
                self._done += 1
            return self._done >= needed

    def wait(self, segment: int, end: int, check: Callable[[], None]) -> None:
        """Waits until it has that; `check` is called now and then, and raises if nobody needs it any more.

        Raises:
            CheckpointEngineError: it will never be there, or what `check` raises.
        """
        while not self.has(segment, end):
            check()
            with contextlib.suppress(LateError):
                self._futures[self._done].exception(_TICK_SECONDS)

    def wait_for_all(self, check: Callable[[], None]) -> None:
        """The same, of everything."""
        if self._ends:
            self.wait(*self._ends[-1], check)

    def give_up(self) -> None:
        """Drops what has not begun, and returns once nothing is written any more."""
        for future in self._futures:
            future.cancel()
        for pool in self._pools:
            pool.shutdown()
