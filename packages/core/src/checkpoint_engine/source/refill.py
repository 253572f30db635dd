"""New bytes for segments that keep their tensors' places, brought while the first of them are being sent already."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
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

_Listener = Callable[[int], None]
"""Takes how many bytes are there, counted from the first of the first segment as if they lay end to end."""


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
        self.sources: Sequence[torch.Tensor] | None = sources
        """As given; None once nothing comes from them any more, since their owner does not wait for us."""
        self._starts = [0, *itertools.accumulate(segment.nbytes for segment in segments)]
        """Where each segment begins, as if they lay end to end; and where the last one ends."""
        self._ends: list[int] = []
        """Where each piece ends, counted like that; ascending."""
        pieces: list[FillPiece] = []
        first = 0
        for number, (segment, stretches) in enumerate(zip(segments, plan.stretches(sources), strict=True)):
            tensors = plan.entries[number].tensors
            mine = sources[first : first + len(tensors)]
            first += len(tensors)
            found = list(pieces_into(segment, tensors, mine, stretches))
            self._ends += [self._starts[number] + piece.end for piece in found]
            pieces += found
        self._pools = (ThreadPoolExecutor(_DOWNLOADERS, "checkpoint-engine-host", taking_turns()), workers())
        downloads, copies = self._pools
        self._there = [False] * len(pieces)
        self._done = 0
        """So many pieces, counted from the first, are there."""
        self._listener: _Listener | None = None
        self._lock = threading.Lock()
        self._futures = [
            (downloads if piece.from_device else copies).submit(self._bring, number, piece)
            for number, piece in enumerate(pieces)
        ]
        for pool in self._pools:
            pool.shutdown(wait=False)

    def has(self, segment: int, end: int) -> bool:
        """Whether everything up to that byte of that segment is there.

        Raises:
            CheckpointEngineError: it will never be.
        """
        needed = min(bisect.bisect_left(self._ends, self._starts[segment] + end) + 1, len(self._futures))
        with self._lock:
            done = self._done
        if done < needed and (awaited := self._futures[done]).done():
            if awaited.cancelled():
                raise CheckpointStateError("what was on its way into this checkpoint was given up; register it again")
            awaited.result()
            return self.has(segment, end)  # it has come meanwhile
        return done >= needed

    def wait(self, segment: int, end: int, check: Callable[[], None]) -> None:
        """Waits until it has that; `check` is called now and then, and raises if nobody needs it any more.

        Raises:
            CheckpointEngineError: it will never be there, or what `check` raises.
        """
        while not self.has(segment, end):
            check()
            with contextlib.suppress(LateError, CancelledError):
                self._futures[min(self._done, len(self._futures) - 1)].exception(_TICK_SECONDS)

    def wait_for_all(self, check: Callable[[], None]) -> None:
        """The same, of everything."""
        self.wait(*self._last, check)

    def has_all(self) -> bool:
        """Whether everything is there; raises as `has` does."""
        return self.has(*self._last)

    def follow(self, listener: _Listener | None) -> None:
        """Has `listener` told how far it has come, now and whenever it has come further; None: nobody from now on."""
        with self._lock:
            self._listener = listener
            self._tell()

    def give_up(self) -> None:
        """Drops what has not begun, and returns once nothing is written any more."""
        for future in self._futures:
            future.cancel()
        for pool in self._pools:
            pool.shutdown()
        self.sources = None

    def _bring(self, number: int, piece: FillPiece) -> None:
        piece.run()
        with self._lock:
            self._there[number] = True
        # The lock was let go after the last byte, and is taken again before anybody is told: processors that change the
        # order of what they write keep this one.
        with self._lock:
            before = self._done
            while self._done < len(self._there) and self._there[self._done]:
                self._done += 1
            if self._done > before:
                self._tell()

    def _tell(self) -> None:
        if self._listener is not None:
            all_there = self._done == len(self._ends)
            self._listener(self._starts[-1] if all_there else self._ends[self._done - 1] if self._done else 0)

    @property
    def _last(self) -> tuple[int, int]:
        """Beyond all of it."""
        return len(self._starts) - 1, 0
