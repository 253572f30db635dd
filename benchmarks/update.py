"""How long an update takes: ours beside upstream's published wheel, in turn, on the same machine and tensors.

    python benchmarks/update.py moe30b --ranks 2 --repeat 5 --upstream SITE
    python benchmarks/update.py moe30b --ranks 2 --ways broadcast:loader broadcast:auto direct:auto

A way is a method and how the engine takes tensors over. SITE is a folder with
`pip install --target SITE checkpoint-engine==0.4.2` (with its dependencies); without it only ours is measured. Every
run is verified byte for byte. Prints a table; raw figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ceilings import host_to_device_rate
from workloads import WORKLOADS

HERE = Path(__file__).parent


@dataclass
class System:
    """One implementation under test: its ranks, and what they measured."""

    name: str
    ranks: list[subprocess.Popen[str]]
    setup: list[dict[str, float | str]] = field(default_factory=list)
    updates: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By way."""

    @classmethod
    def start(cls, name: str, arguments: argparse.Namespace, port: int, site: Path | None = None) -> System:
        """Starts one process a rank and waits until all have registered their share."""
        ranks = []
        for rank in range(arguments.ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(arguments.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "LOGURU_LEVEL": "WARNING",
                "PS_STAGING": arguments.staging,
            }
            if site is not None:
                environment["PYTHONPATH"] = f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            command = [sys.executable, str(HERE / "rank.py"), arguments.workload, arguments.device]
            ranks.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                )
            )
        system = cls(name, ranks)
        system.setup = system.answers()
        return system

    def ask(self, command: str) -> list[dict[str, float]]:
        """Gives all ranks a command and collects their answers."""
        for rank in self.ranks:
            rank.stdin.write(command + "\n")
            rank.stdin.flush()
        return self.answers()

    def answers(self) -> list[dict[str, float]]:
        """One line of JSON from each rank."""
        lines = [rank.stdout.readline() for rank in self.ranks]
        if not all(lines):
            raise SystemExit(f"{self.name}: a rank ended; see its output above")
        return [json.loads(line) for line in lines]

    def update(self, way: str = "", command: str = "update") -> None:
        """One verified update; its time is that of the slowest rank."""
        results = self.ask(" ".join([command, *way.split(":")]).strip())
        wrong = sum(answer["wrong_bytes"] for answer in self.ask("verify"))
        label = f"{self.name} {way}".strip()
        if wrong:
            raise SystemExit(f"{label}: {wrong} bytes are wrong")
        slowest = max(results, key=lambda result: result["seconds"])
        if command == "update":
            self.updates.setdefault(way, []).append(slowest)
        print(f"  {label:24} {slowest['seconds']:.3f} s  {json.dumps(slowest.get('stages', {}))}", flush=True)

    def end(self) -> None:
        """Lets the ranks go."""
        for rank in self.ranks:
            rank.stdin.write("end\n")
            rank.stdin.flush()
        for rank in self.ranks:
            rank.wait(60)

    def rows(self) -> dict[str, dict[str, float]]:
        """Medians, by way. The first update of a way proves its plan, and the second checks it: these do not count."""
        return {
            f"{self.name} {way}".strip(): {
                "update": statistics.median(update["seconds"] for update in updates[2:] or updates),
                "first update": updates[0]["seconds"],
                "register": max(float(rank["register"]) for rank in self.setup),
                "gather metas": max(float(rank["gather_metas"]) for rank in self.setup),
                "engine loader": statistics.median(update["engine_seconds"] for update in updates),
            }
            for way, updates in self.updates.items()
        }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--staging", choices=["release", "persistent"], default="release", help="between our updates")
    parser.add_argument("--ways", nargs="+", default=["broadcast:loader"], help="of ours, METHOD:RELOAD each")
    parser.add_argument("--upstream", type=Path, help="folder with upstream's wheel")
    parser.add_argument("--trace", type=Path, help="trace one more update of ours into this file")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()

    nbytes = sum(tensor.nbytes for tensor in WORKLOADS[arguments.workload]())
    rate = host_to_device_rate(arguments.ranks) if arguments.device == "cuda" else float("nan")
    limit = nbytes / arguments.ranks / rate
    torch.cuda.empty_cache()
    systems = [System.start("ours", arguments, 29711)]
    if arguments.upstream:
        systems.append(System.start("upstream", arguments, 29731, arguments.upstream))
    # One way after the other: what a worker keeps registered for direct updates goes with a broadcast.
    for way in arguments.ways:
        for _ in range(arguments.repeat + 2):
            systems[0].update(way)
            if way == arguments.ways[0] and len(systems) > 1:
                systems[1].update()
    if arguments.trace:
        systems[0].update(command=f"trace {arguments.trace.resolve()}")
    for system in systems:
        system.end()

    report(arguments, systems, nbytes, rate, limit)


def report(arguments: argparse.Namespace, systems: list[System], nbytes: int, rate: float, limit: float) -> None:
    """Writes the raw figures and prints the table."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for system in systems:
        record = {
            "workload": arguments.workload,
            "system": system.setup[0]["system"],
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "ranks": arguments.ranks,
            "staging": arguments.staging if system.name == "ours" else "",
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "bytes": nbytes,
            "seconds": system.rows(),
            "ceilings": {"host_to_device_bytes_per_second": rate, "update_limit_seconds": limit},
            "updates": system.updates,
            "setup": system.setup,
        }
        path = arguments.output / f"{arguments.workload}-{system.name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    rows = {name: row for system in systems for name, row in system.rows().items()}
    first = next(iter(rows))
    print(
        f"\n{arguments.workload}: {nbytes / 1e9:.1f} GB, {arguments.ranks} ranks, host to device {rate / 1e9:.1f} GB/s"
    )
    print(f"limit of an update: {limit:.3f} s; the last column is the share of it that is reached")
    print(f"{'median seconds':24}" + "".join(f"{stage:>14}" for stage in rows[first]) + f"{'of limit':>10}")
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{value:14.3f}" for value in row.values()) + f"{limit / row['update']:10.0%}")


if __name__ == "__main__":
    main()
