"""Fills segments: decides where each tensor lies, and lets many threads bring the bytes there at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.errors import CheckpointFormatError, HostMemoryError
from checkpoint_engine.host.memory import require_host_memory
from checkpoint_engine.host.numa import taking_turns
from checkpoint_engine.planning.buckets import align_up
from checkpoint_engine.source.safetensors_file import SafetensorsFile
from checkpoint_engine.source.segment import LARGEST_SEGMENT, Segment

__all__ = [
    "SEGMENT_TARGET",
    "FileRange",
    "FillPiece",
    "Filled",
    "NewSegments",
    "Placement",
    "SegmentSource",
    "Work",
    "assign_segments",
    "pieces_of_files",
    "read_into",
    "run_all",
    "touch_all",
    "workers",
]

SEGMENT_TARGET = 8 << 30
"""Bytes of a segment, at most: few enough for a large checkpoint that engines' workers can map them all."""

_SMALLEST_TARGET = 1 << 30
_SEGMENTS = 16
"""As many as this for a smaller checkpoint: they are pinned side by side while the next ones are filled, and engines'
workers, which register them too, begin to copy out of the first ones while they register the rest.

No bucket spans two segments, so no copy ever straddles two registrations, which drivers refuse.
"""

_CHUNK = 32 << 20
"""Bytes that one thread brings in one go."""

_MOST_PIECES = 1024  # IOV_MAX
_MOST_THREADS = 16

Work = Callable[[], None]
FileRange = tuple[SafetensorsFile, int]
"""A file, and the byte of it at which a tensor begins."""


@dataclass(frozen=True)
class FillPiece:
    """A stretch of a segment, and what brings its bytes there."""

    start: int
    end: int
    run: Work
    from_device: bool = False
    """Whether a device writes it; the others need a processor."""


@dataclass(frozen=True)
class Filled:
    """A segment and what lies in it."""

    segment: Segment
    entry: SegmentEntry


@dataclass(frozen=True)
class Placement:
    """A new home for tensors `first` onwards: one of `tensors` for each, with its offset in `segment`."""

    segment: Segment
    first: int
    tensors: tuple[TensorEntry, ...]

    def filled(self) -> Filled:
        """The same, once the bytes are there."""
        self.segment.mark_touched()
        return Filled(self.segment, SegmentEntry(self.segment.nbytes, self.tensors, self.segment.address))


class SegmentSource(Protocol):
    """Where segments come from."""

    @property
    def spare(self) -> int:
        """Bytes that it can give without taking new memory."""
        ...

    def take(self, smallest: int, wanted: int, first: TensorEntry) -> Segment:
        """A segment of at least `smallest` bytes, and of `wanted` if it is made anew; `first` will lie at its start.

        Raises:
            HostMemoryError: memory is short.
        """
        ...


class NewSegments:
    """Makes each segment anew."""

    spare = 0

    def take(self, smallest: int, wanted: int, first: TensorEntry) -> Segment:
        """A new segment of `wanted` bytes."""
        del first
        return Segment.create(max(smallest, wanted))


def workers() -> ThreadPoolExecutor:
    """As many threads as this process has processors, at most 16; on all memory nodes that it may use."""
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(threads, "checkpoint-engine-host", initializer=taking_turns())


def assign_segments(tensors: Sequence[TensorEntry], source: SegmentSource) -> Iterator[Placement]:
    """Lays tensors out in order, each at a multiple of 256 bytes, one segment after the other.

    Raises:
        HostMemoryError: a tensor is larger than the largest segment, or memory is short.
    """
    needed = sum(align_up(tensor.nbytes) for tensor in tensors)
    require_host_memory(max(0, needed - source.spare), f"a checkpoint of {len(tensors)} tensors")
    target = min(SEGMENT_TARGET, max(_SMALLEST_TARGET, needed // _SEGMENTS))
    first = 0
    while first < len(tensors):
        smallest = tensors[first].nbytes
        if smallest > LARGEST_SEGMENT:
            raise HostMemoryError(
                f"tensor {tensors[first].name!r} has {smallest} bytes, the largest segment {LARGEST_SEGMENT}; split it"
            )
        wanted = _end(_lay_out(tensors, first, max(target, smallest)))
        segment = source.take(smallest, wanted, tensors[first])
        placed = _lay_out(tensors, first, segment.nbytes)
        yield Placement(segment, first, placed)
        first += len(placed)


def read_into(pool: ThreadPoolExecutor, placement: Placement, sources: Sequence[FileRange]) -> None:
    """Reads each placed tensor.

    Raises:
        CheckpointFormatError: a file is gone, cannot be read, or changed meanwhile.
        HostMemoryError: memory ran short.
    """
    with contextlib.ExitStack() as opened:
        files = {file.path: file for file, _ in sources}
        descriptors = {path: opened.enter_context(file.open()) for path, file in files.items()}
        reads = _reads(placement.segment, placement.tensors, sources)
        run_all(pool, (partial(read.run, descriptors[read.file.path]) for read in reads))


def pieces_of_files(
    segment: Segment, tensors: Sequence[TensorEntry], sources: Sequence[FileRange]
) -> Iterator[FillPiece]:
    """What is to be read, in order; all pieces may be read at once, each raises as `read_into` does."""
    for read in _reads(segment, tensors, sources):
        yield FillPiece(read.pieces[0][0], read.pieces[-1][1], read.run_alone)


def touch_all(pool: ThreadPoolExecutor, placement: Placement) -> None:
    """Makes the kernel hand over all pages that will be filled; a driver that has to do that itself takes longer.

    Raises:
        HostMemoryError: memory ran short.
    """
    segment, end = placement.segment, placement.segment.nbytes
    run_all(pool, (_touch(segment, start, min(end, start + _CHUNK)) for start in range(0, end, _CHUNK)))


def run_all(pool: ThreadPoolExecutor, work: Iterable[Work]) -> None:
    """Runs all of it. After the first failure, what has not begun is dropped; nothing runs any more on return."""
    futures = [pool.submit(piece) for piece in work]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def _touch(segment: Segment, start: int, end: int) -> Work:
    return lambda: segment.touch(start, end)


def _lay_out(tensors: Sequence[TensorEntry], first: int, room: int) -> tuple[TensorEntry, ...]:
    placed: list[TensorEntry] = []
    offset = 0
    for index in range(first, len(tensors)):
        tensor = tensors[index]
        if offset + tensor.nbytes > room:
            break
        placed.append(tensor.moved(offset - tensor.offset))
        offset = align_up(offset + tensor.nbytes)
    return tuple(placed)


def _end(placed: Sequence[TensorEntry]) -> int:
    return align_up(placed[-1].offset + placed[-1].nbytes)


@dataclass
class _Read:
    """A range of a file without a gap, and the places in the segment to which it goes piece by piece."""

    segment: Segment
    file: SafetensorsFile
    start: int
    nbytes: int
    pieces: list[tuple[int, int]]

    def take(self, start: int, target: int, nbytes: int) -> bool:
        """Adds a piece if it follows in the file and there is room."""
        follows = start == self.start + self.nbytes
        if not follows or self.nbytes + nbytes > _CHUNK or len(self.pieces) == _MOST_PIECES:
            return False
        last_start, last_end = self.pieces[-1]
        if last_end == target:
            self.pieces[-1] = (last_start, target + nbytes)
        else:
            self.pieces.append((target, target + nbytes))
        self.nbytes += nbytes
        return True

    def run_alone(self) -> None:
        with self.file.open() as descriptor:
            self.run(descriptor)

    def run(self, descriptor: int) -> None:
        self.segment.touch(self.pieces[0][0], self.pieces[-1][1])
        buffers = [self.segment.buffer(start, end) for start, end in self.pieces]
        position, end = self.start, self.start + self.nbytes
        while position < end:
            try:
                got = os.preadv(descriptor, buffers, position)
            except OSError as error:
                raise CheckpointFormatError(f"cannot read {self.file.path}: {error.strerror}") from error
            if got == 0:
                raise CheckpointFormatError(
                    f"{self.file.path} was truncated to {os.fstat(descriptor).st_size} bytes while it was being "
                    f"read, {end} and more are needed"
                )
            position += got
            buffers = _rest(buffers, got)


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []


def _reads(segment: Segment, tensors: Sequence[TensorEntry], sources: Sequence[FileRange]) -> list[_Read]:
    reads: list[_Read] = []
    for tensor, (file, start) in zip(tensors, sources, strict=True):
        for done in range(0, tensor.nbytes, _CHUNK):
            nbytes = min(_CHUNK, tensor.nbytes - done)
            target = tensor.offset + done
            if reads and reads[-1].file is file and reads[-1].take(start + done, target, nbytes):
                continue
            reads.append(_Read(segment, file, start + done, nbytes, [(target, target + nbytes)]))
    return reads
