"""Host memory that ranks offer to the other processes of their host.

Others open it through the kernel's view of the owner (`/proc/PID/fd`), so no name has to be agreed upon.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from checkpoint_engine.errors import RankError
from checkpoint_engine.host.segment import Segment


class LentSegment(msgspec.Struct, frozen=True):
    """A segment as its owner knows it."""

    descriptor: int
    inode: int
    nbytes: int


class Offer(msgspec.Struct, frozen=True):
    """What a rank can lend to processes of its host."""

    host: str
    process: int
    segments: tuple[LentSegment, ...]
    obstacle: str = ""
    """What keeps it from lending them."""


def make_offer(segments: Sequence[Segment]) -> Offer:
    """This rank's offer."""
    in_place = next((segment.file for segment in segments if segment.file is not None), None)
    obstacle = (
        f"{in_place} is used where it lies, and whoever truncates it would kill the engine's workers; register it with "
        "use_inplace_pin_memory=False"
        if in_place is not None
        else ""
    )
    lent = tuple(LentSegment(segment.fd, os.fstat(segment.fd).st_ino, segment.nbytes) for segment in segments)
    return Offer(this_host(), os.getpid(), lent, obstacle)


def this_host() -> str:
    """Equal for processes that can see each other's files under /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def open_lent(rank: int, offer: Offer, segment: LentSegment) -> int:
    """A file descriptor of this process for a segment that a rank of this host lends.

    Raises:
        RankError: it cannot be opened, or that rank has given it up meanwhile.
    """
    path = f"/proc/{offer.process}/fd/{segment.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RankError(
            f"cannot open the host memory of rank {rank} (process {offer.process}): {error.strerror}; ranks of a "
            "direct update run under one user and in one container. --method broadcast does without"
        ) from error
    if os.fstat(descriptor).st_ino != segment.inode:
        os.close(descriptor)
        raise RankError(f"rank {rank} (process {offer.process}) has given up its host memory meanwhile; gather again")
    return descriptor
