"""New bytes for segments that keep their tensors' places, brought while the first of them are being sent already."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from dataclasses import dataclass
from typing import TypeVar

import torch

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.host.numa import taking_turns
from checkpoint_engine.source.copying import pieces_into
from checkpoint_engine.source.filling import FileRange, FillPiece, pieces_of_files, workers
from checkpoint_engine.source.refill_plan import RefillPlan
from checkpoint_engine.source.segment import Segment

__all__ = ["NewFiles", "NewTensors", "Refill"]

_DOWNLOADERS = 2
"""While one waits for its bytes, the other has told the device of the next: the bus never idles."""
_TICK_SECONDS = 0.05

_Listener = Callable[[int], None]
"""Takes how many bytes are there, counted from the first of the first segment as if they lay end to end."""


@dataclass(frozen=True)
class NewTensors:
    """New values in memory, as the plan gave them; they stay as they are until all are copied."""

    plan: RefillPlan
    values: Sequence[torch.Tensor]

    def pieces(self, segments: Sequence[Segment]) -> Iterator[list[FillPiece]]:
        """What brings them, for each segment."""
        stretches = self.plan.stretches(self.values)
        for segment, mine, tensors, values in zip(
            segments, stretches, *_by_segment(self.plan, self.values), strict=True
        ):
            yield list(pieces_into(segment, tensors, values, mine))


@dataclass(frozen=True)
class NewFiles:
    """New values in files, as the plan gave them; a file that is written to before all is read is refused by name."""

    plan: RefillPlan
    ranges: Sequence[FileRange]

    def pieces(self, segments: Sequence[Segment]) -> Iterator[list[FillPiece]]:
        """What reads them, for each segment."""
        for segment, tensors, ranges in zip(segments, *_by_segment(self.plan, self.ranges), strict=True):
            yield list(pieces_of_files(segment, tensors, ranges))


class Refill:
    """Copies that run by themselves, in the order in which an update sends what they bring."""

    def __init__(self, new: NewTensors | NewFiles, segments: Sequence[Segment]) -> None:
        """Starts to bring it into the plan's segments, which are pinned and touched."""
        self.plan = new.plan
        self.sources = new.values if isinstance(new, NewTensors) else None
        """Tensors as given; None once nothing comes from them any more, since their owner does not wait for us."""
        self._starts = [0, *itertools.accumulate(segment.nbytes for segment in segments)]
        """Where each segment begins, as if they lay end to end; and where the last one ends."""
        self._ends: list[int] = []
        """Where each piece ends, counted like that; ascending."""
        pieces: list[FillPiece] = []
        for start, found in zip(self._starts, new.pieces(segments), strict=False):
            self._ends += [start + piece.end for piece in found]
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


_T = TypeVar("_T")


def _by_segment(plan: RefillPlan, values: Sequence[_T]) -> tuple[list[tuple[TensorEntry, ...]], list[Sequence[_T]]]:
    """The tensors of each segment, and what of `values` is theirs."""
    tensors = [entry.tensors for entry in plan.entries]
    ends = list(itertools.accumulate(map(len, tensors)))
    return tensors, [values[end - len(mine) : end] for mine, end in zip(tensors, ends, strict=True)]
