"""Processes that a test did not start itself."""

from __future__ import annotations

import contextlib
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Asked of every process: the kernel's own list of children may leave some out while they run."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = entry.read_text().rpartition(")")[2].split()[1]
            found += [int(entry.parent.name)] if int(parent) == pid else []
    return found
