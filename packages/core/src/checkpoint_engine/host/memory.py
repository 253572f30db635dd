"""How much host memory can still be taken, before anybody takes it.

The kernel hands out memory that it does not have and kills somebody later; a container is killed at its own limit.
So both are asked first.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoint_engine.errors import HostMemoryError

__all__ = ["FreeMemory", "free_host_memory", "require_host_memory"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_FILES = ("active_file", "inactive_file")
_RESERVE = 128 << 20
"""Bytes left to everybody else: page tables, the process itself."""
_PAGES = 64 << 10
"""So few bytes are not asked about: reading what all control groups hold takes 2 ms, and the reserve covers them."""


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be taken, and what sets that bound."""

    nbytes: int
    bound: str


def free_host_memory(proc: Path | None = None, cgroups: Path | None = None) -> FreeMemory:
    """The least of what the host has available and what each control group above this process still allows."""
    bounds = [FreeMemory(max(0, nbytes), bound) for nbytes, bound in _bounds(proc or _PROC, cgroups or _CGROUPS)]
    return min(bounds, key=lambda free: free.nbytes, default=FreeMemory(1 << 62, "no known limit"))


def require_host_memory(nbytes: int, purpose: str, free: FreeMemory | None = None) -> None:
    """Raises unless `nbytes` more can be taken.

    Raises:
        HostMemoryError: they cannot; the message holds the numbers.
    """
    if nbytes <= _PAGES:
        return
    free = free or free_host_memory()
    if nbytes + _RESERVE > free.nbytes:
        raise HostMemoryError(
            f"{purpose} needs {_gib(nbytes)} of host memory, {_gib(free.nbytes)} are free ({free.bound}) of which "
            f"{_gib(_RESERVE)} are kept back; free some, raise the limit, or spread the checkpoint over more hosts"
        )


def _bounds(proc: Path, cgroups: Path) -> Iterator[tuple[int, str]]:
    for kibibytes in _keyed_numbers(proc / "meminfo", "MemAvailable:").values():
        yield kibibytes * 1024, "MemAvailable of the host"
    for group in _groups(proc, cgroups):
        yield from _group_bounds(group)


def _groups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Directories of the memory control groups above this process, of either version of the interface."""
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = cgroups / controllers
            # Inside a container the path may be the host's, where it names nothing here: the root still counts.
            inner = root / path.lstrip("/")
            yield from (group for group in (inner, *inner.parents) if group.is_relative_to(root) and group.is_dir())


def _group_bounds(group: Path) -> Iterator[tuple[int, str]]:
    for limit_file, used_file in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, used = _number(group / limit_file), _number(group / used_file)
        if limit is None or used is None:
            continue
        # Cached files count as used, but give way. Version 1 says "total_" where it includes the groups below.
        statistics = _keyed_numbers(group / "memory.stat", *_FILES, *(f"total_{key}" for key in _FILES))
        cached = sum(statistics.get(f"total_{key}", statistics.get(key, 0)) for key in _FILES)
        yield limit - max(0, used - cached), f"control group limit {_gib(limit)} in {group / limit_file}"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max": no limit here
        return None


def _keyed_numbers(path: Path, *keys: str) -> dict[str, int]:
    """The numbers behind some keys of a file with a key and a number in each line."""
    with contextlib.suppress(OSError):
        text = path.read_text()
        pattern = rf"^({'|'.join(map(re.escape, keys))})\s+(\d+)"
        return {key: int(number) for key, number in re.findall(pattern, text, re.MULTILINE)}
    return {}


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
