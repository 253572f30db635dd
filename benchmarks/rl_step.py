"""What one step of reinforcement learning costs: all weights changed on a trainer's GPU, then served by an engine.

    python benchmarks/rl_step.py moe15b --upstream SITE          stand-in engine on the same GPU, ours beside upstream's
    python benchmarks/rl_step.py moe15b --ranks 2 --systems device device-fsdp2    two trainers on it, engine with TP 2
    python benchmarks/rl_step.py smoke --device cpu --steps 6    to see that it runs

A step is everything between the change and the engine's having it: register or refresh, gather, update, unregister.
Every byte changes before every step, and every byte that the engine holds is compared after it. Each rank is a trainer
and a worker of the engine; they share the GPUs that there are. A trainer holds a share of the whole tensors, or with
`…-fsdp2` its rows of every one, as DTensors. What workers' copies read is counted, beside what they keep. SITE is a
folder with `pip install --target SITE checkpoint-engine==0.4.2` (with its dependencies). Raw figures go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from steps import HERE, UNCOUNTED, StepsError, medians, run_steps
from workloads import WORKLOADS

SYSTEMS = ("device", "host", "host-direct", "host-broadcast")


def run(system: str, arguments: argparse.Namespace, port: int) -> list[dict[str, Any]]:
    """The steps of one system, in a process of its own."""
    try:
        return run_steps(
            system,
            arguments.workload,
            arguments.device,
            arguments.steps,
            ranks=arguments.ranks,
            port=port,
            site=arguments.upstream,
        )
    except StepsError as error:
        raise SystemExit(f"{system}: {error}") from None


def show(record: dict[str, Any]) -> None:
    """Prints a table: medians of the counted steps."""
    print(f"\n{record['workload']}: {record['bytes'] / 1e9:.1f} GB, {record['tensors']} tensors, {record['device']}")
    print(f"{record['ranks']} trainers and as many workers")
    print(f"{'':18}{'register':>9}{'gather':>9}{'update':>9}{'whole':>9}{'first':>9}{'GB/s':>9}")
    for system, rows in record["steps"].items():
        found = medians(rows)
        cells = [found.get(name, 0.0) for name in ("register", "gather", "update", "whole")]
        cells += [rows[0]["seconds"]["whole"], record["bytes"] / found["whole"] / 1e9]
        print(f"{system:18}" + "".join(f"{cell:9.3f}" for cell in cells))
    for system, rows in record["steps"].items():
        for rank, kept in enumerate(rows[-1]["kept_bytes"]):
            read = sorted({row["read_bytes"][rank] for row in rows[UNCOUNTED:] or rows[-1:]})
            print(
                f"{system:18} worker {rank} keeps {kept:,} bytes; its copies read {' or '.join(f'{n:,}' for n in read)}"
            )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=1, help="trainers, and workers of the engine")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="also …-cpu: the trainer's tensors there")
    parser.add_argument("--upstream", type=Path, help="a folder with upstream's wheel")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    systems = list(dict.fromkeys([*arguments.systems, *(["upstream"] if arguments.upstream else [])]))
    tensors = WORKLOADS[arguments.workload]()
    record = {
        "workload": arguments.workload,
        "engine": "stand-in",
        "ranks": arguments.ranks,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "versions": {"torch": torch.__version__},
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "tensors": len(tensors),
        "steps": {system: run(system, arguments, 29600 + 20 * index) for index, system in enumerate(systems)},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"rl-step-{arguments.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    show(record)


if __name__ == "__main__":
    main()
