"""Memory that ranks export to the other processes of their host.

Others open it through the kernel's view of the owner (`/proc/PID/fd`), so no name has to be agreed upon.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from checkpoint_engine.device.memory import Allocation, Memory, SharedSegments
from checkpoint_engine.errors import RankError
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import HeldSegment

__all__ = [
    "RING",
    "Export",
    "ExportedBlock",
    "ExportedSegment",
    "ExportedSegments",
    "export_segments",
    "open_exported",
    "this_host",
]

RING = -1
"""Stands for a rank where the ring's number is asked for."""


class ExportedBlock(msgspec.Struct, frozen=True, array_like=True):
    """An allocation of a segment of device memory, as its owner knows it: handed out by a handle or a descriptor."""

    start: int
    nbytes: int
    identity: int
    handle: bytes
    descriptor: int


class ExportedSegment(msgspec.Struct, frozen=True):
    """A segment as its owner knows it: host memory has a descriptor, device memory its blocks."""

    descriptor: int
    inode: int
    nbytes: int
    blocks: tuple[ExportedBlock, ...] = ()

    @property
    def descriptors(self) -> int:
        """How many file descriptors it takes to hand it out."""
        return sum(not block.handle for block in self.blocks) if self.blocks else 1


class Export(msgspec.Struct, frozen=True):
    """What a rank exports to processes of its host."""

    host: str
    process: int
    segments: tuple[ExportedSegment, ...]
    obstacle: str = ""
    """What keeps it from exporting them."""


def export_segments(segments: Sequence[HeldSegment]) -> Export:
    """What this rank exports."""
    in_place = next((segment.file for segment in segments if segment.file is not None), None)
    obstacle = (
        f"{in_place} is used where it lies, and whoever truncates it would kill the engine's workers; register it with "
        "use_inplace_pin_memory=False"
        if in_place is not None
        else ""
    )
    return Export(this_host(), os.getpid(), tuple(map(_exported, segments)), obstacle)


def _exported(segment: HeldSegment) -> ExportedSegment:
    if isinstance(segment, Segment):
        return ExportedSegment(segment.fd, os.fstat(segment.fd).st_ino, segment.nbytes)
    blocks = (
        ExportedBlock(block.address - segment.address, block.nbytes, block.identity, block.handle, block.descriptor)
        for block in segment.blocks
    )
    return ExportedSegment(-1, 0, segment.nbytes, tuple(blocks))


def this_host() -> str:
    """Equal for processes that can see each other's files under /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _open_segment(rank: int, export: Export, segment: ExportedSegment) -> list[int]:
    """File descriptors of this process for a segment that a rank of this host exports; none where handles do without.

    Raises:
        RankError: one cannot be opened, or that rank has given it up meanwhile.
    """
    if not segment.blocks:
        return [open_exported(rank, export, segment.descriptor, segment.inode)]
    opened: list[int] = []
    try:
        opened.extend(
            open_exported(rank, export, block.descriptor, block.identity)
            for block in segment.blocks
            if not block.handle
        )
    except RankError:
        for descriptor in opened:
            os.close(descriptor)
        raise
    return opened


def open_exported(rank: int, export: Export, number: int, inode: int) -> int:
    """A file descriptor of this process for what stands behind that number in another process of this host.

    Raises:
        RankError: it cannot be opened, or stands for something else by now.
    """
    path = f"/proc/{export.process}/fd/{number}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RankError(
            f"cannot open the host memory of rank {rank} (process {export.process}): {error.strerror}; ranks of a "
            "direct update run under one user and in one container. --method broadcast does without"
        ) from error
    if os.fstat(descriptor).st_ino != inode:
        os.close(descriptor)
        raise RankError(f"rank {rank} (process {export.process}) has given up its host memory meanwhile; gather again")
    return descriptor


class ExportedSegments:
    """All segments of all ranks of this host, ready to go over a link; behaves like staging memory."""

    def __init__(self, exports: Mapping[int, Export]) -> None:
        """Opens them; `exports` are by rank, and by `RING` what others' buckets are fetched into.

        Raises:
            RankError: another rank's memory cannot be opened.
        """
        opened: list[int] = []
        self.descriptors: tuple[int, ...] = ()
        self._numbers: dict[tuple[int, int], int] = {}
        # In the order in which workers will need them: the ranks take turns, and each sends segment by segment.
        order = sorted((index, rank) for rank, export in exports.items() for index in range(len(export.segments)))
        try:
            for index, rank in order:
                opened += _open_segment(rank, exports[rank], exports[rank].segments[index])
                self._numbers[rank, index] = len(self._numbers)
        finally:
            self.descriptors = tuple(opened)
            if len(self._numbers) < len(order):
                self.close()
        segments = [exports[rank].segments[index] for index, rank in order]
        allocations = {number: _allocations(segment) for number, segment in enumerate(segments) if segment.blocks}
        sizes = tuple(segment.nbytes for segment in segments)
        self.memory: Memory = SharedSegments(sizes, _lease(exports.values()), allocations)

    def number(self, rank: int, segment: int) -> int:
        """Which of the exported segments a rank's own segment is."""
        return self._numbers[rank, segment]

    def close(self) -> None:
        """Closes this process's descriptors of them."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


def _allocations(segment: ExportedSegment) -> tuple[Allocation, ...]:
    return tuple(Allocation(block.start, block.nbytes, block.handle) for block in segment.blocks)


def _lease(exports: Iterable[Export]) -> str:
    """Names these very segments: an inode number is not given out again while somebody holds the inode."""
    digest = hashlib.sha256()
    for export in exports:
        segments = [(segment.inode, segment.nbytes, segment.blocks) for segment in export.segments]
        digest.update(msgspec.msgpack.encode((export.host, export.process, segments)))
    return digest.hexdigest()[:32]
