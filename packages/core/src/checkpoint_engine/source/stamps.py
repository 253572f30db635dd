"""Stamps of files that are used where they lie: whoever writes to one changes a registered checkpoint."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint_engine.errors import CheckpointFormatError

__all__ = ["FileStamp", "read_whole"]

_SAMPLES = 256
_SAMPLE = 64
"""Bytes of each sample."""

_CLOCK_TICK = 0.02
"""Seconds within which two writes can leave the same time of change behind."""


@dataclass(frozen=True)
class FileStamp:
    """What a file was like when it was mapped.

    The time of change tells of whoever wrote to it, samples of its bytes tell of those who left no time: `cp -p`, and
    writing through a mapping. Another file that takes its name by being renamed is another file, and does no harm.
    """

    nbytes: int
    changed: int
    samples: bytes

    @classmethod
    def take(cls, path: Path, descriptor: int, start: int, end: int) -> FileStamp:
        """That of the bytes `start` to `end` of an open file; waits until its time of change has passed.

        Raises:
            CheckpointFormatError: it is being written to.
        """
        before = os.fstat(descriptor)
        time.sleep(min(_CLOCK_TICK, max(0.0, before.st_mtime + _CLOCK_TICK - time.time())))
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointFormatError(f"{path} is being written to; register it once its writer is done")
        return cls(after.st_size, after.st_mtime_ns, _samples(path, descriptor, start, end))

    def check(self, path: Path, descriptor: int, start: int, end: int, *, samples: bool = True) -> None:
        """Raises if the file is not what it was; without `samples` as far as its size and time tell.

        Raises:
            CheckpointFormatError: it was truncated or written to.
        """
        status = os.fstat(descriptor)
        if status.st_size < end:
            raise _truncated(path, status.st_size, end)
        if (status.st_size, status.st_mtime_ns) != (self.nbytes, self.changed):
            raise _written_again(path)
        if samples and _samples(path, descriptor, start, end) != self.samples:
            raise _written_again(path)


def read_whole(path: Path, descriptor: int, buffer: memoryview, start: int) -> None:
    """Fills a buffer from a file. Unlike reading a mapping of it, this survives that the file is truncated.

    Raises:
        CheckpointFormatError: the file ends before.
    """
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], start + done)
        if not got:
            raise _truncated(path, os.fstat(descriptor).st_size, start + len(buffer))
        done += got


def _samples(path: Path, descriptor: int, start: int, end: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for first, nbytes in _places(start, end):
        found = os.pread(descriptor, nbytes, first)
        if len(found) < nbytes:
            raise _truncated(path, os.fstat(descriptor).st_size, end)
        digest.update(found)
    return digest.digest()


def _places(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Spread evenly, with the first and the last bytes among them."""
    if end - start <= _SAMPLES * _SAMPLE:
        yield start, end - start
        return
    for number in range(_SAMPLES):
        yield start + (end - start - _SAMPLE) * number // (_SAMPLES - 1), _SAMPLE


def _truncated(path: Path, nbytes: int, needed: int) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} was truncated to {nbytes} bytes after it had been registered in place with {needed}; unregister the "
        "checkpoint and register it again"
    )


def _written_again(path: Path) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} was written to after it had been registered in place: what was registered is gone. Unregister the "
        "checkpoint and register it again; writers that rename a new file over the old one, and "
        "use_inplace_pin_memory=False, keep a registered checkpoint as it is"
    )
