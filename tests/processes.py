"""Processes that a test did not start itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Asked of every process: the kernel's own list of children may leave some out while they run."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = entry.read_text().rpartition(")")[2].split()[1]
            found += [int(entry.parent.name)] if int(parent) == pid else []
    return found


def remove_unmapped(files: Iterable[Path]) -> None:
    """Removes files of shared memory that a killed process left behind, and leaves those that one still has mapped."""
    mapped = set[str]()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            mapped |= {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    for file in files:
        if str(file) not in mapped:
            file.unlink(missing_ok=True)
