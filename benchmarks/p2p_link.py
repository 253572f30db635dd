"""Does the pipeline overlap? A join over a link whose rate tc limits, between two network namespaces. Needs root.

    sudo .venv/bin/python benchmarks/p2p_link.py --rate 400 --megabytes 512

The engine is a stand-in that takes a given time over every byte, so that fetching and loading cost about the same: one
after the other they would need twice the link's time. What counts is seconds over bytes / rate; 1.2 is the aim.
Ethernet, IP and TCP headers are not counted as payload: at an MTU of 1500 they take 5%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.contract.sink import Update
from checkpoint_engine.device import open_device
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.server.parameter_server import ParameterServer

SEED, JOINER = "10.202.0.1", "10.202.0.2"
TENSOR = 4 << 20


class SlowEngine:
    """Takes `rate` bytes a second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.sums: dict[str, int] = {}

    def begin(self, update: Update) -> None:
        """Takes whatever comes."""

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Adds up what comes, and takes its time."""
        for name, tensor in tensors:
            started = time.perf_counter()
            self.sums[name] = int(tensor.view(torch.int64).sum())
            time.sleep(max(0.0, tensor.nbytes / self._rate - (time.perf_counter() - started)))

    def finish(self) -> Mapping[str, str | int | float]:
        """Nothing to do."""
        return {}

    def abort(self) -> bool:
        """Nothing to restore."""
        return True


def tensors_of(nbytes: int) -> dict[str, torch.Tensor]:
    """Noise, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"t{i}": torch.randint(-(1 << 60), 1 << 60, (TENSOR // 8,), dtype=torch.int64, generator=generator)
        for i in range(nbytes // TENSOR)
    }


def seed(nbytes: int, metas: str) -> None:
    """Holds the tensors until the input ends."""
    server = ParameterServer(rank=0, world_size=1, device="cpu")
    server.register_checkpoint("step-1", named_tensors=tensors_of(nbytes))
    server.gather_metas("step-1")
    server.catalog().save(Path(metas))
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def join(nbytes: int, metas: str, load_rate: float, rounds: int) -> None:
    """Joins, and compares every tensor."""
    server = ParameterServer(rank=0, world_size=1, device="cpu")
    server.load_catalogs([Catalog.load(Path(metas))])
    engine = SlowEngine(load_rate)
    reports: list[dict[str, float]] = []
    for _ in range(rounds):
        server.update("step-1", lambda handles: _receive(handles[0][1], engine))
        if server.last_report is None:
            raise SystemExit("the update left no report")
        reports.append(server.last_report.seconds)
    expected = {name: int(tensor.sum()) for name, tensor in tensors_of(nbytes).items()}
    if engine.sums != expected:
        raise SystemExit("what came is not what was sent")
    print(json.dumps(reports), flush=True)
    os._exit(0)


def _receive(handle: str, engine: SlowEngine) -> None:
    receive_update(handle, engine, open_device("cpu", rank=0), timeout=600)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Makes the two hosts, limits the link, and joins over it."""
    rate = options.rate * 1e6 / 8
    nbytes = options.megabytes * (1 << 20) // TENSOR * TENSOR
    names = [f"ce-bench-{os.getpid()}-{side}" for side in ("seed", "joiner")]
    environment = {
        **os.environ,
        "CHECKPOINT_ENGINE_P2P": "1",
        "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
        "PS_MAX_BUCKET_SIZE_GB": str(options.bucket / 1024),
    }
    with tempfile.TemporaryDirectory() as directory:
        metas = f"{directory}/metas.json"
        try:
            _connect(names, options.rate)
            here = [sys.executable, __file__, "--megabytes", str(options.megabytes), "--metas", metas]
            holder = subprocess.Popen(
                ["ip", "netns", "exec", names[0], *here, "--role", "seed"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            try:
                if holder.stdout is None or holder.stdout.readline() != "ready\n":
                    raise SystemExit("the seed did not start")
                joining = [*here, "--role", "join", "--load-rate", str(rate * options.load), "--rounds", "3"]
                done = subprocess.run(
                    ["ip", "netns", "exec", names[1], *joining],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=environment,
                )
            finally:
                holder.kill()
                holder.communicate()
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False)
    rounds = json.loads(done.stdout.splitlines()[-1])
    limit = nbytes / rate
    return {
        "bytes": nbytes,
        "link_bytes_per_s": rate,
        "load_bytes_per_s": rate * options.load,
        "limit_s": limit,
        "one_after_the_other_s": limit + limit / options.load,
        "rounds": rounds,
        "ratios": [round(seconds["total"] / limit, 3) for seconds in rounds],
    }


def _connect(names: Sequence[str], megabits: float) -> None:
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    for name in names:
        ip("netns", "add", name)
    ip("-n", names[0], "link", "add", "net0", "type", "veth", "peer", "name", "net0", "netns", names[1])
    for name, address in zip(names, (SEED, JOINER), strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "net0")
        ip("-n", name, "link", "set", "net0", "up")
        ip("-n", name, "link", "set", "lo", "up")
    limit = ["tbf", "rate", f"{megabits}mbit", "burst", "1mb", "latency", "50ms"]
    subprocess.run(["tc", "-n", names[0], "qdisc", "add", "dev", "net0", "root", *limit], check=True)


def main() -> None:
    """Runs one of the roles; without one, all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=400, help="of the link, in Mbit/s")
    parser.add_argument("--megabytes", type=int, default=256, help="to be sent, in MiB")
    parser.add_argument("--bucket", type=float, default=8, help="size of a bucket, in MiB")
    parser.add_argument("--load", type=float, default=1.2, help="the engine's rate as a multiple of the link's")
    parser.add_argument("--role", choices=["seed", "join"], help=argparse.SUPPRESS)
    parser.add_argument("--metas", help=argparse.SUPPRESS)
    parser.add_argument("--load-rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    nbytes = options.megabytes * (1 << 20) // TENSOR * TENSOR
    if options.role == "seed":
        seed(nbytes, options.metas)
    elif options.role == "join":
        join(nbytes, options.metas, options.load_rate, options.rounds)
    else:
        print(json.dumps(measure(options), indent=1))


if __name__ == "__main__":
    main()
