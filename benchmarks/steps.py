"""Steps of one system on all ranks of this host, each rank a process of its own.

What `rl_step.py` and `seed_table.py` start, and what they make of the rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
UNCOUNTED = 3
"""Steps in which plans are recorded, proved and checked."""
Row = dict[str, Any]


class StepsError(Exception):
    """The ranks ended early, were not done in time, or brought wrong bytes. `rows` are those until then."""

    def __init__(self, why: str, rows: list[Row]) -> None:
        super().__init__(why)
        self.rows = rows


def run_steps(
    system: str,
    workload: str,
    device: str,
    steps: int,
    *,
    ranks: int = 1,
    port: int,
    site: Path | None = None,
    seconds: float = 600.0,
) -> list[Row]:
    """Runs `trainer.py` on all ranks; one row for each step and system, each of its times that of the slowest rank.

    Raises:
        StepsError: see there.
    """
    command = [sys.executable, str(HERE / "trainer.py"), system, workload, device, str(steps)]
    lines: queue.Queue[str | None] = queue.Queue()
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    rows: list[Row] = []
    expected = steps * len(system.split("+"))
    try:
        for rank in range(ranks):
            environment = _environment(rank, ranks, port, site if system.startswith("upstream") else None)
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
                )
            )
            readers.append(threading.Thread(target=_read, args=(processes[-1], lines, expected), daemon=True))
            readers[-1].start()
        deadline = time.monotonic() + seconds
        while len(rows) < expected:
            rows.append(_together(lines, ranks, deadline, rows, seconds))
            _show(rows[-1])
        for process in processes:
            process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"  {system}: all steps done, but the ranks do not end", flush=True)
    finally:
        for process in processes:
            _kill(process)
        for reader in readers:
            reader.join(5)
    return rows


def _environment(rank: int, ranks: int, port: int, site: Path | None) -> dict[str, str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOGURU_LEVEL": "WARNING",
    }
    if site is not None:
        environment["PYTHONPATH"] = f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return environment


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None], expected: int) -> None:
    """Passes on a rank's lines, and None once it has ended without some of them."""
    with process.stdout or contextlib.nullcontext(()) as output:
        for line in output:
            lines.put(line)
            expected -= 1
    if expected > 0:
        lines.put(None)


def _together(lines: queue.Queue[str | None], ranks: int, deadline: float, before: list[Row], seconds: float) -> Row:
    """One step of all ranks. They keep in step, so that their lines do."""
    rows: list[Row] = []
    while len(rows) < ranks:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise StepsError(f"not done after {seconds:.0f} s, {len(before)} steps", before) from None
        if line is None:
            raise StepsError(f"a rank ended after {len(before)} steps; see its output above", before)
        rows.append(json.loads(line))
    slowest = max(rows, key=lambda row: row["seconds"]["whole"])
    row = {
        **slowest,
        "seconds": {name: max(each["seconds"][name] for each in rows) for name in slowest["seconds"]},
        "cpu_seconds": sum(each["cpu_seconds"] for each in rows),
        "failure": next((each["failure"] for each in rows if each["failure"]), ""),
        "wrong_bytes": sum(each["wrong_bytes"] for each in rows),
        **{name: [each[name] for each in sorted(rows, key=_rank)] for name in ("read_bytes", "kept_bytes")},
        "device_bytes_used": max(each["device_bytes_used"] for each in rows),
    }
    if row["failure"] or row["wrong_bytes"]:
        raise StepsError(row["failure"] or f"{row['wrong_bytes']} bytes are wrong", before)
    return row


def _rank(row: Row) -> int:
    return row["rank"]


def _show(row: Row) -> None:
    seconds = {name: round(value, 4) for name, value in row["seconds"].items()}
    print(f"  {row['system']:16} {row['step']:3} {json.dumps(seconds)} {json.dumps(row['stages'])}", flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """With its worker, which is of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def medians(rows: Sequence[Row], *, uncounted: int = UNCOUNTED) -> Mapping[str, float]:
    """Seconds of each part of a step, of those steps that count."""
    counted = rows[uncounted:] or rows[-1:]
    names = dict.fromkeys(name for row in counted for name in row["seconds"])
    found = {name: statistics.median(row["seconds"].get(name, 0.0) for row in counted) for name in names}
    return {**found, "cpu": statistics.median(row["cpu_seconds"] for row in counted)}
