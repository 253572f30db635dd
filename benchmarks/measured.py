"""Updates of a real engine, timed: what measurements of all engines have in common."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from senders import Senders


def register(senders: Senders, model: Path, ways: Sequence[str]) -> float:
    """Registers a checkpoint for updates in these ways; returns the seconds that took."""
    begin = time.perf_counter()
    senders.register(model, in_place=not any(way.startswith("direct") for way in ways))
    return time.perf_counter() - begin


def save(record: dict[str, Any], output: Path, engine: str) -> None:
    """Keeps the raw figures."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{engine}-{record['workload']}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


def show_ways(record: dict[str, Any], *stages: str) -> None:
    """Prints a table: the seconds of these stages, and of whole updates, in medians."""
    nbytes, tensors = record["bytes"], record["tensors"]
    for way in record["ways"]:
        # By plan, the first update of all is the proof and the second its check.
        runs = [run for run in record["updates"] if run["way"] == way]
        print(f"{way}, first {runs[0]['wall']:.3f} s; then, in medians:")
        for stage in ("connect", "copy", "load", "finish", *stages, "total", "wall"):
            values = [run[stage] for run in runs[2:] or runs if stage in run]
            if values and (value := statistics.median(values)):
                rate, each = nbytes / value / 1e9, value / tensors * 1e6
                print(f"{stage:12}{value:8.3f} s {rate:8.1f} GB/s {each:8.1f} µs a tensor")
