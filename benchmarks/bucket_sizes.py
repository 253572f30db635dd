"""How long an update takes for several bucket sizes: the curve behind the default of `PS_MAX_BUCKET_SIZE_GB`.

    python benchmarks/bucket_sizes.py moe30b --ranks 2 --sizes 32 64 128 256 512 1024 --plot curve.png

Registers the workload once, then updates a stand-in engine with one bucket size after the other, `--repeat` rounds over
all of them, so that whatever changes over time meets all sizes alike. Every run is verified byte for byte. Raw figures
go to benchmarks/results/. `--device cpu` shows that it runs; it says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ceilings import host_to_device_rate
from update import HERE, System
from workloads import WORKLOADS

MIB = 1 << 20
DEFAULT = 256
WAY = "broadcast:auto"
STAGES = ("connect", "copy", "broadcast", "load", "finish")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024], help="MiB")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--staging", choices=["release", "persistent"], default="release")
    parser.add_argument("--plot", type=Path, help="draw the curve into this file")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()

    nbytes = sum(tensor.nbytes for tensor in WORKLOADS[arguments.workload]())
    rate = host_to_device_rate(arguments.ranks) if arguments.device == "cuda" else None
    torch.cuda.empty_cache()
    limit = nbytes / arguments.ranks / rate if rate else None
    rows = measure(arguments)
    save(arguments, rows, nbytes, rate, limit)
    print_table(arguments, rows, nbytes, limit)
    if arguments.plot:
        plot(arguments, rows, nbytes, limit)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each size, with the figures of the slowest rank in each round."""
    system = System.start("ours", arguments, 29751)
    try:
        for size in arguments.sizes:  # the first update with a size connects ranks, or lets staging grow
            system.ask(f"bucket-size {size * MIB}")
            system.update(WAY)
        by_size: dict[int, list[dict[str, Any]]] = {size: [] for size in arguments.sizes}
        for _ in range(arguments.repeat):
            for size in arguments.sizes:
                system.ask(f"bucket-size {size * MIB}")
                system.update(WAY)
                by_size[size].append(system.updates[WAY][-1])
    finally:
        system.end()
    return [summarise(size, updates) for size, updates in by_size.items()]


def summarise(size: int, updates: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one size."""
    last = updates[-1]
    stages = {stage: statistics.median(update["stages"][stage] for update in updates) for stage in STAGES}
    return {
        "bucket_size": size * MIB,
        "seconds": {"update": statistics.median(update["seconds"] for update in updates), **stages},
        "buckets": last["buckets"],
        "staging": last["staging"],
        "staging_kept": last["staging_kept"],
        "updates": updates,
    }


def save(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], nbytes: int, rate: float | None, limit: float | None
) -> None:
    """One object for each size."""
    common = {
        "workload": arguments.workload,
        "method": "broadcast",
        "system": "ours",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "ranks": arguments.ranks,
        "staging_lifetime": arguments.staging,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "bytes": nbytes,
        "ceilings": {"host_to_device_bytes_per_second": rate, "update_limit_seconds": limit},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"bucket-sizes-{arguments.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps([{**common, **row} for row in rows], indent=1) + "\n")
    print(f"\n{path}")


def print_table(arguments: argparse.Namespace, rows: list[dict[str, Any]], nbytes: int, limit: float | None) -> None:
    """Medians by size."""
    print(f"{arguments.workload}: {nbytes / 1e9:.1f} GB, {arguments.ranks} ranks, staging {arguments.staging}")
    if limit:
        print(f"limit of an update: {limit:.3f} s")
    names = ("MiB", "buckets", "update", *STAGES, "of limit", "staging")
    print("".join(f"{name:>10}" for name in names))
    for row in rows:
        seconds = row["seconds"]
        share = f"{limit / seconds['update']:.0%}" if limit else ""
        figures = "".join(f"{seconds[stage]:>10.3f}" for stage in ("update", *STAGES))
        size = f"{row['bucket_size'] // MIB:>10}{row['buckets']:>10}"
        print(f"{size}{figures}{share:>10}  {row['staging']}")


def plot(arguments: argparse.Namespace, rows: list[dict[str, Any]], nbytes: int, limit: float | None) -> None:
    """Time against bucket size, with the spread of the rounds."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only for plots

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [row["bucket_size"] / MIB for row in rows]
    rounds = [[update["seconds"] for update in row["updates"]] for row in rows]
    axes.fill_between(sizes, [min(r) for r in rounds], [max(r) for r in rounds], color="#2f6db3", alpha=0.15, lw=0)
    axes.plot(sizes, [row["seconds"]["update"] for row in rows], "o-", color="#2f6db3", label="update, median")
    for stage, colour in (("copy", "#7b5ea7"), ("broadcast", "#e08a1e"), ("load", "#2e8b57")):
        axes.plot(sizes, [row["seconds"][stage] for row in rows], ".-", color=colour, lw=1, label=stage)
    if limit:
        axes.axhline(limit, color="#b3261e", ls="--", lw=1, label="limit of host to device")
    if min(sizes) <= DEFAULT <= max(sizes):
        axes.axvline(DEFAULT, color="#6b7480", ls=":", lw=1, label="default")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bucket size, MiB")
    axes.set_ylabel("seconds")
    device = "CPU" if arguments.device == "cpu" else torch.cuda.get_device_name()
    axes.set_title(f"{arguments.workload}, {nbytes / 1e9:.1f} GB, {arguments.ranks} ranks, {device}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.plot, dpi=130)


if __name__ == "__main__":
    main()
