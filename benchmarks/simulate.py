"""A SIMULATION, not a measurement: how long a step takes on machines that are not there, by the product's own plans.

    python benchmarks/simulate.py                                   # the table
    python benchmarks/simulate.py --model kimi-k2 --hosts 32 --parallel 16 --method broadcast direct
    python benchmarks/simulate.py --check                           # beside what was measured on one and two GPUs
    python benchmarks/simulate.py --planning 64 4096                # what planning costs a rank: real code, timed

Catalogs, buckets, their order, places in staging, who reads what from whom: all of that is the product's. Wires have
measured rates (one and two H200 or H100); network cards, which were not there, have assumed ones, and so does NCCL
between hosts. `link_hosts.py` compares with real updates over several hosts on slow links.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from simulation.machines import Machine
from simulation.models import MODELS, catalog_of
from simulation.steps import METHODS, Step, simulate_step

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.planning.buckets import plan_buckets
from checkpoint_engine.planning.staging import choose_layout, place_buckets

RESULTS = Path(__file__).with_name("results")
LANDED = (
    ("moe15b-ours-20261123-111646", ""),
    ("moe15b-ours-20261123-152224", "broadcast:auto"),
    ("moe15b-ours-20261123-152224", "direct:auto"),
    ("moe15b-ours-20261128-144724", "broadcast:auto"),
    ("moe30b-ours-20261128-140001", "direct:auto"),
    ("moe30b-ours-20261128-142211", "broadcast:auto"),
    ("moe30b-ours-20261128-142211", "direct:auto"),
)
"""Runs, and ways in them; of updates from the third on."""
TABLE = (
    # model, hosts of 8 GPUs, workers of an engine, seconds that upstream published
    ("glm-4.5-air", 1, 8, "3.47 (H800)"),
    ("qwen3-235b", 1, 8, "6.22 (H800)"),
    ("deepseek-v3.1", 2, 16, "10.19 (H20)"),
    ("kimi-k2", 2, 16, "14.36 (H20)"),
    ("deepseek-v3.1", 32, 16, "11.33 (H20)"),
    ("kimi-k2", 32, 16, "16.04 (H20)"),
    ("kimi-k2", 128, 16, ""),
    ("kimi-k2", 512, 16, ""),
)


def step_of(model: str, machine: Machine, method: str, parallel: int) -> Step:
    """Simulates one."""
    catalog = catalog_of(MODELS[model](), machine.ranks, machine.hosts, by="bytes")
    return simulate_step(machine, catalog, method, parallel=parallel)


def check() -> list[dict[str, Any]]:
    """Landed runs beside their simulation, with the bus and the prelude that each of them measured."""
    found: list[dict[str, Any]] = []
    for name, way in LANDED:
        record = json.loads((RESULTS / f"{name}.json").read_text())
        updates = (record["updates"][way] if way else record["updates"])[2:]
        method, gpus = (way or record.get("method", "broadcast")).partition(":")[0], record["ranks"]
        prelude = statistics.median(update["stages"]["connect"] for update in updates)
        machine = Machine(1, gpus, bus=record["ceilings"]["host_to_device_bytes_per_second"], prelude=prelude)
        step = simulate_step(machine, catalog_of(MODELS[record["workload"]](), gpus), method, parallel=gpus)
        measured = statistics.median(update["seconds"] for update in updates)
        found.append({
            "run": name,
            "method": method,
            "gpus": gpus,
            "measured": round(measured, 3),
            "simulated": round(step.seconds, 3),
            "ratio": round(step.seconds / measured, 3),
        })  # fmt: skip
    return found


def planning(ranks: int) -> dict[str, float]:
    """Seconds that one rank spends on 139,401 tensors held by so many ranks; the second time all of it is known."""
    catalog = catalog_of(MODELS["kimi-k2"](), ranks, max(1, ranks // 8), by="bytes")
    parts = [msgspec.msgpack.encode(holding) for holding in catalog.holdings]
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it gives
        begin = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - begin, 3)
        return result

    kind = type(catalog.holdings[0])
    holdings = timed("decode", lambda: tuple(msgspec.msgpack.decode(part, type=kind) for part in parts))
    known = timed("validate", lambda: Catalog("simulated", holdings).validate())
    plan = timed("plan", lambda: plan_buckets(known, 256 << 20))
    layout = timed("layout", lambda: choose_layout(plan, ranks, 16 << 30))
    if layout is not None:
        timed("place", lambda: place_buckets(plan, layout, 0))
    return {**seconds, "all": round(sum(seconds.values()), 3), "gathered_bytes": sum(map(len, parts))}


def show(rows: list[tuple[str, ...]]) -> None:
    """Prints columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def table(models: list[tuple[str, int, int, str]], methods: list[str], machine: Machine) -> None:
    """Simulates and prints."""
    rows = [("model", "GPUs", "TP", "method", "seconds", "bound", "control", "buckets", "upstream published")]
    for model, hosts, parallel, published in models:
        for method in methods:
            here = replace(machine, hosts=hosts)
            if method == "device" and hosts > 1:
                continue
            step = step_of(model, here, method, parallel)
            figures = (f"{step.seconds:.2f}", f"{step.bound:.2f}", f"{step.control:.2f}", str(step.buckets))
            rows.append((model, str(here.ranks), str(parallel), method, *figures, published))
    print("SIMULATED, nothing of it measured: seconds of an update\n")
    show(rows)
    print(f"\n{machine}")


def main() -> None:
    """Simulates what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of a host")
    parser.add_argument("--parallel", type=int, default=8, help="workers of an engine, each of which keeps a part")
    parser.add_argument("--method", choices=[*METHODS], nargs="+", default=["broadcast", "direct", "device"])
    parser.add_argument("--card", type=float, default=Machine.card / 1e9, help="GB/s of a network card")
    parser.add_argument("--check", action="store_true", help="simulate what was measured")
    parser.add_argument("--planning", type=int, nargs="+", metavar="RANKS", help="time real plans for so many ranks")
    options = parser.parse_args()
    if options.check:
        found = check()
        show([tuple(found[0]), *(tuple(map(str, row.values())) for row in found)])
    elif options.planning:
        print(json.dumps({str(ranks): planning(ranks) for ranks in options.planning}, indent=1))
    else:
        given = [(options.model, options.hosts, options.parallel, "")] if options.model else [*TABLE]
        table(given, options.method, Machine(gpus=options.gpus, card=options.card * 1e9))


if __name__ == "__main__":
    main()
