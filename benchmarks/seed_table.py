"""The table by which this field knows upstream, on the GPUs of one host: ours and upstream's published wheel in turn.

    python benchmarks/seed_table.py --gpus 2 --upstream SITE --workloads glm-4.5-air qwen3-235b deepseek-v3.1 kimi-k2
    python benchmarks/seed_table.py --gpus 1 2 4 8 --gigabytes 30 --workloads qwen3-235b    # scaling, 30 GB a GPU
    python benchmarks/seed_table.py --device cpu --gpus 2 --workloads smoke-fp8             # to see that it runs

Models have their real shapes, cut to as many layers as `--gigabytes` of each GPU hold. Trainer's weights lie on the
GPUs, a share on each; stand-in engines keep a part of every tensor (tensor parallel over all GPUs). Every byte changes
before every step, and every byte that an engine holds is compared after it. Each system runs in processes of its own,
with a deadline. SITE is a folder with `pip install --target SITE checkpoint-engine==0.4.2` (with its dependencies).
Needs of each GPU twice those gigabytes and some for staging, of the host once the sum. Raw figures go to
benchmarks/results/ after every system.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from steps import HERE, UNCOUNTED, Row, StepsError, medians, run_steps
from workloads import MIXTURES, tensors_of

SYSTEMS = ("device", "host-direct+host-broadcast", "upstream", "host", "upstream-p2p")
LEFT_OUT = "left out"
NAMES = {
    "upstream": "upstream: Update (Broadcast)",
    "upstream-p2p": "upstream: Update (P2P)",
    "host-broadcast": "ours: Update (Broadcast)",
    "host-direct": "ours: Update (Direct)",
    "host": "ours: step through host memory, one call",
    "host-cpu": "ours: the same, the trainer's tensors on the CPU",
    "device": "ours: step from device memory, one call",
}
"""Rows of the table, in order."""


@dataclass
class Run:
    """One workload on so many GPUs."""

    workload: str
    layers: int
    gpus: int
    device: str
    ceilings: dict[str, float]
    steps: dict[str, list[Row]] = field(default_factory=dict)
    """By system."""
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cut = f"{self.workload}@{self.layers}"
        self.sizes = [tensor.nbytes for tensor in tensors_of(self.cut)]
        self.started = time.strftime("%Y%m%d-%H%M%S")

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint."""
        return sum(self.sizes)

    def title(self) -> str:
        """What it is."""
        of = MIXTURES[self.workload].layers
        return (
            f"{self.workload}, {self.layers} of {of} layers, {self.nbytes / 1e9:.1f} GB, {len(self.sizes)} tensors, "
            f"TP {self.gpus} on {self.gpus}x {self.device}"
        )

    def limit(self, system: str) -> float:
        """Seconds that the busiest wire needs; NaN where it was not measured."""
        each = self.nbytes / self.gpus
        rate = {name.removesuffix("_bytes_per_second"): rate for name, rate in self.ceilings.items()}
        nan = float("nan")
        if system == "device":
            peers = each * (self.gpus - 1) / self.gpus
            return peers / rate.get("peer", nan) if self.gpus > 1 else each / rate.get("device", nan)
        bus = each / rate.get("host_to_device", nan)
        if system == "host":  # what is filled is sent while the rest is still being filled
            return max(bus, each / rate.get("both_ways", nan))
        if system in ("host-cpu", "host-direct") or self.gpus == 1:
            return bus
        return max(bus, self.nbytes / rate.get("nccl_broadcast", nan))

    def record(self) -> dict[str, Any]:
        """All figures."""
        return {
            "workload": self.workload,
            "layers": [self.layers, MIXTURES[self.workload].layers],
            "engine": "stand-in",
            "device": self.device,
            "gpus": self.gpus,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "bytes": self.nbytes,
            "tensors": len(self.sizes),
            "ceilings": self.ceilings,
            "steps": self.steps,
            "failures": self.failures,
        }

    def save(self, output: Path) -> None:
        """Keeps the raw figures."""
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"seed-table-{self.workload}-{self.gpus}gpu-{self.started}.json"
        path.write_text(json.dumps(self.record(), indent=1) + "\n")

    def rows(self) -> list[list[str]]:
        """Of the table."""
        found = [["", "GatherMetas", "Update", "whole step", "first step", "limit", "reached", "cores", "bucket"]]
        for system, name in NAMES.items():
            if system in self.failures:
                found.append([name, self.failures[system], *[""] * 7])
            if not (rows := self.steps.get(system)):
                continue
            each = medians(rows, uncounted=uncounted(system))
            limit, timed = self.limit(system), each["whole" if system in ("host", "host-cpu") else "update"]
            found.append([
                f"{name}, {len(rows[uncounted(system) :]) or 1} counted",
                f"{each['gather']:.3f} s" if "gather" in each else "",
                f"{each['update']:.3f} s",
                f"{each['whole']:.3f} s",
                f"{rows[0]['seconds']['whole']:.2f} s",
                f"{limit:.3f} s",
                f"{limit / timed:.0%}" if limit == limit else "",  # noqa: PLR0124 - NaN: not measured
                f"{each['cpu'] / each['whole']:.1f}",
                f"{rows[-1]['bucket_bytes'] / (1 << 30):.2f} GiB",
            ])  # fmt: skip
        return found


def uncounted(system: str) -> int:
    """First steps that prepare: ours records, proves and checks plans; upstream pins memory."""
    return 1 if system.startswith("upstream") else UNCOUNTED


def measure_ceilings(gpus: int, device: str, seconds: float) -> dict[str, float]:
    """In a process of its own; what it found until its deadline."""
    command = [sys.executable, str(HERE / "ceilings.py"), "--gpus", str(gpus), "--device", device]
    try:
        output = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds, check=False).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    lines = output.decode().splitlines()
    rates: dict[str, float] = json.loads(lines[-1]) if lines else {}
    print("  " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items()), flush=True)
    return rates


def missing(system: str, upstream: Path | None) -> str:
    """Why a system is left out; empty if it is not."""
    if system.startswith("upstream") and upstream is None:
        return f"{LEFT_OUT}: no --upstream"
    if (
        system.endswith("p2p")
        and not find_spec("mooncake")
        and not (upstream is not None and (upstream / "mooncake").is_dir())
    ):
        return f"{LEFT_OUT}: mooncake is not installed"
    return ""


def measure(run: Run, arguments: argparse.Namespace) -> None:
    """One system after the other."""
    print(f"\n{run.title()}", flush=True)
    for number, systems in enumerate(arguments.systems):
        begin = time.monotonic()
        names = systems.split("+")
        if why := missing(systems, arguments.upstream):
            run.failures[systems] = why
            print(f"  {systems}: {why}", flush=True)
            run.save(arguments.output)
            continue
        try:
            rows = run_steps(
                systems,
                run.cut,
                arguments.device,
                arguments.upstream_steps if systems.startswith("upstream") else arguments.steps,
                ranks=run.gpus,
                port=arguments.port + 20 * number,
                site=arguments.upstream,
                seconds=arguments.deadline * len(names),
            )
        except StepsError as error:
            rows = error.rows
            done = {row["system"] for row in rows}
            run.failures[next((name for name in names if name not in done), names[-1])] = str(error)
            print(f"  {systems}: {error}", flush=True)
        for row in rows:
            run.steps.setdefault(row["system"], []).append(row)
        print(f"  {systems}: {time.monotonic() - begin:.0f} s in all", flush=True)
        run.save(arguments.output)


def markdown(rows: list[list[str]]) -> str:
    """A table."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def show(runs: list[Run]) -> None:
    """All tables, and how it grows with the GPUs where several counts were run."""
    for run in runs:
        rates = ", ".join(f"{name.removesuffix('_bytes_per_second')} {r / 1e9:.1f}" for name, r in run.ceilings.items())
        print(f"\n**{run.title()}**; GB/s of each GPU: {rates}\n\n{markdown(run.rows())}")
    if len({run.gpus for run in runs}) > 1:
        head = ["workload", "GPUs", "GB a GPU", "", "update", "limit", "reached", "cores"]
        body = [scaling_row(run, system) for system in NAMES for run in runs if run.steps.get(system)]
        print(f"\n**Scaling**\n\n{markdown([head, *sorted(body, key=lambda row: (row[0], row[3]))])}")


def scaling_row(run: Run, system: str) -> list[str]:
    """One system on so many GPUs."""
    each, limit = medians(run.steps[system], uncounted=uncounted(system)), run.limit(system)
    figures = [f"{each['update']:.3f} s", f"{limit:.3f} s", f"{limit / each['update']:.0%}" if limit == limit else ""]  # noqa: PLR0124
    size = f"{run.nbytes / run.gpus / 1e9:.1f}"
    return [run.workload, str(run.gpus), size, NAMES[system], *figures, f"{each['cpu'] / each['whole']:.1f}"]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*MIXTURES], default=["glm-4.5-air", "qwen3-235b"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[max(1, torch.cuda.device_count())])
    parser.add_argument("--gigabytes", type=float, default=30.0, help="of the checkpoint, for each GPU")
    parser.add_argument("--layers", type=int, help="in place of --gigabytes")
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), help="A+B: in turn in the same processes; also host-cpu"
    )
    parser.add_argument("--upstream", type=Path, help="a folder with upstream's wheel")
    parser.add_argument("--steps", type=int, default=6, help=f"of ours, of which the first {UNCOUNTED} do not count")
    parser.add_argument("--upstream-steps", type=int, default=4, help="of which the first does not count")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds of one system")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--port", type=int, default=29600)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    runs: list[Run] = []
    for gpus in arguments.gpus:
        ceilings = measure_ceilings(gpus, arguments.device, arguments.deadline)
        for workload in arguments.workloads:
            layers = arguments.layers or MIXTURES[workload].layers_of(arguments.gigabytes * 1e9 * gpus)
            runs.append(Run(workload, min(layers, MIXTURES[workload].layers), gpus, device, ceilings))
            measure(runs[-1], arguments)
    show(runs)
    sys.exit(any(not why.startswith(LEFT_OUT) for run in runs for why in run.failures.values()))


if __name__ == "__main__":
    main()
