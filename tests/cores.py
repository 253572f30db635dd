"""Which core an engine under test computes on: each process of pytest has its own, so that they run side by side."""

from __future__ import annotations

import os

__all__ = ["core", "cores"]


def core() -> str:
    """The core of this process of pytest."""
    return cores(1)


def cores(workers: int) -> str:
    """Those of that many workers of an engine, as vLLM and SGLang are told: the first one's is `core()`."""
    first, count = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")), os.cpu_count() or 1
    return "|".join(str((first + worker) % count) for worker in range(workers))
