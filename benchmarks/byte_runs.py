"""How long the byte runs of a large model take to plan: 140,000 tensors, as a tensor-parallel worker copies them.

python benchmarks/byte_runs.py [TENSORS]
"""

from __future__ import annotations

import statistics
import sys
import time

from checkpoint_engine.planning.byte_runs import CopyLayout, PlannedCopy, plan_byte_runs

WORKERS = 8
EXPERTS = 384
HIDDEN, INNER = 7168, 2048


def copies(tensors: int) -> list[PlannedCopy]:
    """Experts in FP8, one of eight workers' part: rows of gate and up, columns of down."""
    part = INNER // WORKERS
    rows = CopyLayout((part, HIDDEN), (HIDDEN, 1), (HIDDEN, 1), 1)
    columns = CopyLayout((HIDDEN, part), (INNER, 1), (part, 1), 1)
    nbytes = INNER * HIDDEN
    found: list[PlannedCopy] = []
    for number in range(tensors):
        expert, kind = divmod(number, 3)
        layer, expert = divmod(expert, EXPERTS)
        segment, place = divmod(number * nbytes, 64 << 30)
        size = part * HIDDEN
        if kind < 2:
            found.append(PlannedCopy(segment, place + 3 * size, 2 * layer, (2 * expert + kind) * size, rows))
        else:
            found.append(PlannedCopy(segment, place + 3 * part, 2 * layer + 1, expert * size, columns))
    return found


def main() -> None:
    """Measures and prints."""
    tensors = int(sys.argv[1]) if len(sys.argv) > 1 else 140_000
    wanted = copies(tensors)
    seconds: list[float] = []
    for _ in range(7):
        begin = time.perf_counter()
        runs = plan_byte_runs(wanted)
        seconds.append(time.perf_counter() - begin)
    print(f"{tensors} tensors, {runs.nbytes / 1e9:.0f} GB for one of {WORKERS} workers: {len(runs)} runs")
    print(f"planned in {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s")
    begin = time.perf_counter()
    print(f"bytes by segment: {len(runs.by_segment())} segments, {time.perf_counter() - begin:.3f} s")


if __name__ == "__main__":
    main()
