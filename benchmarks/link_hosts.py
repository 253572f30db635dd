"""Is the simulator right? Direct updates over several hosts with links of a rate that tc limits, and as simulated.

    sudo .venv/bin/python benchmarks/link_hosts.py --hosts 2 4 8 --rate 200 --megabytes 256

Each host is a network and a process namespace with one rank, which holds its share, and one worker, which keeps its
part of every tensor: what it lacks is read from all other hosts. Prints one JSON object: seconds of an update as
measured (median of the last three, the slowest rank of each), as simulated, and what the links need.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from simulation.machines import Machine
from simulation.models import Shape, catalog_of
from simulation.steps import simulate_step

from checkpoint_engine.contract.sink import Update
from checkpoint_engine.device import open_device
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.reload.reloader import Reloader
from checkpoint_engine.server.parameter_server import ParameterServer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.p2p.hosts import Network

TENSOR = 4 << 20
COLUMNS = 1 << 12
WARM_UP = 2
UPDATES = 5
HEADERS = 1500 / 1448
"""An Ethernet frame over what it carries for TCP; tc counts frames."""


def shapes_of(nbytes: int) -> list[Shape]:
    """Tensors alike."""
    return [Shape(f"t{number}", "int64", (TENSOR // 8 // COLUMNS, COLUMNS)) for number in range(nbytes // TENSOR)]


class Worker:
    """Keeps a part of the rows of every tensor, by plan."""

    def __init__(self, rank: int, ranks: int, shapes: Sequence[Shape]) -> None:
        self._place = rank, ranks
        rows = TENSOR // 8 // COLUMNS // ranks
        self.kept = {shape.name: torch.zeros(rows, COLUMNS, dtype=torch.int64) for shape in shapes}
        shadow = {name: tensor.to("meta") for name, tensor in self.kept.items()}
        self._reloader = Reloader(self._into(self.kept), self.kept, lambda: (self._into(shadow), shadow))
        self.load, self.finish, self.wanted = self._reloader.load, self._reloader.finish, self._reloader.wanted

    def _into(self, kept: Mapping[str, torch.Tensor]) -> Callable[[Sequence[tuple[str, torch.Tensor]]], None]:
        rank, ranks = self._place

        def load(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in tensors:
                kept[name].copy_(tensor.chunk(ranks)[rank])

        return load

    def begin(self, update: Update) -> None:
        """Begins."""
        self._reloader.begin(update.tensors, update.reload)

    def abort(self) -> bool:
        """Gives up."""
        self._reloader.failed()
        return False


def be_rank(rank: int, ranks: int, address: str, nbytes: int) -> None:
    """Registers a share of new values before each update, updates, and compares every byte that the worker keeps."""
    shapes = shapes_of(nbytes)
    share = -(-len(shapes) // ranks)
    server = ParameterServer(rank=rank, world_size=ranks, master_addr=address, master_port=29_500, device="cpu")
    worker = Worker(rank, ranks, shapes)
    seconds: list[float] = []
    for version in range(UPDATES):
        name = f"step-{version}"
        mine = shapes[rank * share : (rank + 1) * share]
        server.register_checkpoint(name, named_tensors={shape.name: values(shape, version) for shape in mine})
        server.gather_metas(name)
        begin = time.perf_counter()
        server.update(name, lambda handles: receive(handles[rank][1], worker), method="direct")
        seconds.append(time.perf_counter() - begin)
        for shape in shapes:
            if not torch.equal(worker.kept[shape.name], values(shape, version).chunk(ranks)[rank]):
                raise SystemExit(f"{shape.name} is not what was sent")
        server.unregister_checkpoint(name)
    print(json.dumps(seconds), flush=True)
    server.close()
    os._exit(0)


def receive(handle: str, worker: Worker) -> None:
    """The worker's side."""
    receive_update(handle, worker, open_device("cpu", rank=0), timeout=600)


def values(shape: Shape, version: int) -> torch.Tensor:
    """Other ones for every tensor and version."""
    first = hash((shape.name, version)) % (1 << 40)
    return torch.arange(first, first + TENSOR // 8).view(shape.shape)


def measure(hosts: int, megabits: float, nbytes: int, bucket: int) -> dict[str, float]:
    """Runs and simulates an update over so many hosts."""
    environment = {
        **os.environ,
        "CHECKPOINT_ENGINE_P2P": "1",
        "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
        "CHECKPOINT_ENGINE_RANKS_SECRET": secrets.token_hex(16),
        "PS_MAX_BUCKET_SIZE_GB": str(bucket / (1 << 30)),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    with Network(hosts) as network:
        for host in range(hosts):
            limit = f"tc qdisc add dev net0 root tbf rate {megabits}mbit burst 256kb latency 100ms"
            subprocess.run(network.command(host, limit.split()), check=True)
        started = [
            subprocess.Popen(
                network.command(
                    host,
                    [
                        *("unshare", "--pid", "--fork", "--mount-proc", sys.executable, __file__),
                        *("--rank", str(host), str(hosts), network.address(0), "--megabytes", str(nbytes >> 20)),
                    ],
                ),
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for host in range(hosts)
        ]
        answers = [process.communicate(timeout=600)[0] for process in started]
    each = [json.loads(answer.splitlines()[-1]) for answer in answers]
    measured = statistics.median(max(rank[version] for rank in each) for version in range(WARM_UP, UPDATES))
    rate = megabits * 1e6 / 8 / HEADERS
    machine = Machine(
        hosts, 1, bus=2e9, device_copy=2e9, card=rate, prelude=0.05, direct_turn=1e-3, ending=0.02, gathering=0.5e-3
    )
    catalog = catalog_of(shapes_of(nbytes), hosts, hosts)
    step = simulate_step(machine, catalog, "direct", parallel=hosts, bucket_size=bucket)
    return {
        "measured": round(measured, 3),
        "simulated": round(step.seconds, 3),
        "ratio": round(step.seconds / measured, 3),
        "links": round(step.bound, 3),
    }


def main() -> None:
    """Runs a rank; or all of them, for each number of hosts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rate", type=float, default=200, help="of each host's link, in Mbit/s")
    parser.add_argument("--megabytes", type=int, default=256, help="of the checkpoint, in MiB")
    parser.add_argument("--bucket", type=float, default=8, help="size of a bucket, in MiB")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    nbytes = options.megabytes << 20
    if options.rank is not None:
        be_rank(int(options.rank[0]), int(options.rank[1]), options.rank[2], nbytes)
    found = {
        str(hosts): measure(hosts, options.rate, nbytes, int(options.bucket * (1 << 20))) for hosts in options.hosts
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
