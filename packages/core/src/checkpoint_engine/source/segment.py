"""A segment: one block of shared host memory that holds tensors."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import torch

from checkpoint_engine.device.base import Device, Pinned
from checkpoint_engine.device.pages import (
    COLLAPSE,
    HUGE,
    HUGE_PAGE,
    REMOVE,
    TOUCH_TO_WRITE,
    advise,
    map_read_only,
    map_shared,
    unmap,
)
from checkpoint_engine.errors import CheckpointFormatError, HostMemoryError
from checkpoint_engine.host.memory import require_host_memory
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.source.stamps import FileStamp, read_whole

__all__ = ["LARGEST_SEGMENT", "ReadOnlyView", "Segment"]

LARGEST_SEGMENT = 64 << 30
"""Bytes. Recent drivers refuse to register several hundred GiB in one call."""

_PAGE = mmap.PAGESIZE


class Segment:
    """Anonymous shared memory, which vanishes with the last process that holds it, or a mapped file.

    `tensor` is a 1-D uint8 view over all of it. The mapping lives until `close` was called and the last view of it
    is gone, so no view ever dangles.
    """

    def __init__(self, descriptor: int, nbytes: int, *, file: Path | None = None, file_start: int = 0) -> None:
        self.fd = descriptor
        self.nbytes = nbytes
        self.file = file
        """The file that is mapped, None for anonymous memory."""
        self.file_start = file_start
        """Where in the file the segment begins."""
        self._mapping = map_shared(descriptor, nbytes, file_start) if nbytes else None
        # Whatever mode the caller is in, our threads must be able to write to it.
        with torch.inference_mode(mode=False):
            self.tensor = _empty() if self._mapping is None else torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.address = self.tensor.data_ptr() if nbytes else 0
        self.pinned: Pinned | None = None
        self.shared: Pinned | None = None
        """Its registration with a transport that reads other hosts' memory into it, or by which they read it."""
        self.stamp: FileStamp | None = None
        """What the file was like when it was mapped."""
        self._held_by_device = False
        """Whether its pages stay, for the device to read, whatever becomes of the file."""
        self._touched = file is not None
        self._huge = file is None
        """Whether huge pages are worth a try."""

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Makes anonymous shared memory of `nbytes`, all zeros; 0 is allowed.

        Raises:
            HostMemoryError: that is more than a segment may hold, or than the host has.
        """
        if nbytes > LARGEST_SEGMENT:
            raise HostMemoryError(f"a segment of {nbytes} bytes was asked for, the largest is {LARGEST_SEGMENT}")
        require_host_memory(nbytes, "a segment")
        descriptor = os.memfd_create("checkpoint-engine-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, nbytes)
            # Whoever gets the descriptor cannot pull the memory from under somebody else.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            segment = cls(descriptor, nbytes)
        except OSError as error:
            os.close(descriptor)
            raise HostMemoryError(f"cannot map {nbytes} bytes of shared memory: {error.strerror}") from error
        segment._prefer_huge_pages()
        return segment

    @classmethod
    def map_file(cls, path: Path, start: int = 0, end: int | None = None) -> Segment:
        """Maps a file, or the pages that hold its bytes `start` to `end`; the file is never deleted.

        Raises:
            CheckpointFormatError: the file cannot be opened for writing, is shorter than `end`, or is being written.
            HostMemoryError: that is more than a segment may hold.
        """
        try:
            # The driver pins pages for writing, unless told otherwise; nothing is ever written.
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointFormatError(f"cannot map {path}: {error.strerror}") from error
        try:
            size = os.fstat(descriptor).st_size
            first, nbytes = _pages(path, size, start, size if end is None else end)
            stamp = FileStamp.take(path, descriptor, first, first + nbytes)
            segment = cls(descriptor, nbytes, file=path, file_start=first)
        except BaseException:
            os.close(descriptor)
            raise
        segment.stamp = stamp
        return segment

    def buffer(self, start: int, end: int) -> memoryview:
        """The bytes `start` to `end`, writable. Do not keep it: it holds the mapping."""
        if self._mapping is None:
            return memoryview(bytearray())
        return memoryview(self._mapping).cast("B")[start:end]

    def read(self, start: int, end: int) -> bytes:
        """A copy of the bytes `start` to `end`.

        Raises:
            CheckpointFormatError: the mapped file was truncated.
        """
        if self.file is None:
            return bytes(self.buffer(start, end))
        found = bytearray(end - start)
        read_whole(self.file, self.fd, memoryview(found), self.file_start + start)
        return bytes(found)

    def bytes_of(self, bucket: Bucket) -> torch.Tensor:
        """The bytes of a bucket that lies here, where they are; or a copy, where looking at them could be fatal.

        A page that a truncated file has lost kills whoever looks at it. Devices keep hold of the pages.

        Raises:
            CheckpointFormatError: the mapped file was truncated.
        """
        if self.file is None or self._held_by_device or not bucket.nbytes:
            return self.tensor[bucket.start : bucket.start + bucket.nbytes]
        copy = mmap.mmap(-1, bucket.nbytes)
        read_whole(self.file, self.fd, memoryview(copy), self.file_start + bucket.start)
        return torch.frombuffer(copy, dtype=torch.uint8)

    def touch(self, start: int, end: int) -> None:
        """Makes the kernel hand over the pages of `start` to `end`. Several threads may do this at once.

        Raises:
            HostMemoryError: it has none left.
        """
        if self._touched or start >= end:
            return
        require_host_memory(end - start, "filling a segment")
        if self._huge:
            self._make_huge(start, end)
        first = start // _PAGE * _PAGE
        code = advise(self.address + first, end - first, TOUCH_TO_WRITE)
        # Before Linux 5.14 there is no such advice; then the first write touches the page.
        if code not in (0, errno.EINVAL, errno.EINTR, errno.EAGAIN):
            raise HostMemoryError(f"the kernel hands over no more host memory: {os.strerror(code)}")

    def mark_touched(self) -> None:
        """From now on, `touch` has nothing to do."""
        self._touched = True

    def check(self, *, samples: bool = True) -> None:
        """Raises if the mapped file is not what it was when it was mapped; quicker without looking at `samples` of it.

        Raises:
            CheckpointFormatError: it was truncated or written to.
        """
        if self.file is not None and self.stamp is not None and self.fd >= 0:
            self.stamp.check(self.file, self.fd, self.file_start, self.file_start + self.nbytes, samples=samples)

    def pin(self, device: Device) -> None:
        """Registers the memory for copies to `device`; does nothing if it is registered already.

        Raises:
            HostMemoryError: the driver refuses.
        """
        if self.pinned is None:
            self.pinned = device.pin(self.tensor)
            self._held_by_device = device.torch_device.type != "cpu"

    def unpin(self) -> None:
        """Has the device forget it; no copy may be under way."""
        if self.pinned is not None:
            pinned, self.pinned, self._held_by_device = self.pinned, None, False
            pinned.close()

    def close(self) -> None:
        """Unpins the memory and gives it up; a mapped file stays as it is."""
        if self.shared is not None:
            shared, self.shared = self.shared, None
            shared.close()
        self.unpin()
        self.tensor, self._mapping = _empty(), None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def discard(self) -> None:
        """Closes it, and gives anonymous memory back at once even if a view lives on, which then reads zeros."""
        if self.file is None and self._mapping is not None:
            advise(self.address, self.nbytes, REMOVE)
        self.close()

    def _prefer_huge_pages(self) -> None:
        # Where the administrator allows it for shared memory, the kernel hands these over by itself.
        advise(self.address, self.nbytes, HUGE)

    def _make_huge(self, start: int, end: int) -> None:
        """Has the kernel make huge pages where they fit: filling and registering are several times faster then."""
        first = start // HUGE_PAGE * HUGE_PAGE
        last = min(-(-end // HUGE_PAGE), self.nbytes // HUGE_PAGE) * HUGE_PAGE
        for offset in range(first, last, HUGE_PAGE):  # where nothing is at all, it makes none
            advise(self.address + offset, _PAGE, TOUCH_TO_WRITE)
        if last > first and advise(self.address + first, last - first, COLLAPSE) in (errno.EINVAL, errno.ENOMEM):
            self._huge = False  # this kernel cannot, or has none left; small pages do as well


class ReadOnlyView:
    """A second mapping of a segment that nobody can write through, at an address of its own."""

    def __init__(self, segment: Segment) -> None:
        """Maps it.

        Raises:
            HostMemoryError: the kernel refuses.
        """
        self._nbytes = segment.nbytes
        try:
            self.address = map_read_only(segment.fd, segment.nbytes, segment.file_start)
        except OSError as error:
            raise HostMemoryError(f"cannot map {segment.nbytes} bytes once more: {error.strerror}") from error

    def close(self) -> None:
        """Unmaps it."""
        if self.address:
            unmap(self.address, self._nbytes)
            self.address = 0


def _pages(path: Path, size: int, start: int, end: int) -> tuple[int, int]:
    """Where the page begins that holds `start`, and the number of bytes from there to `end`."""
    if not 0 <= start <= end <= size:
        raise CheckpointFormatError(f"{path} has {size} bytes, but {start} to {end} are to be mapped")
    first = start // _PAGE * _PAGE
    if end - first > LARGEST_SEGMENT:
        raise HostMemoryError(f"{end - first} bytes of {path} are to be mapped, the most are {LARGEST_SEGMENT}")
    return first, end - first


def _empty() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")
