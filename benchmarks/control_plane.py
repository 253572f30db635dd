"""What an update costs besides bytes: CPU time by stage, 18,867 tensors of a few bytes each, one worker, on the CPU.

    python benchmarks/control_plane.py [--workload moe30b-tiny] [--repeat 15] [--ways broadcast:auto direct:auto]

The engine is the stand-in of `rank.py`, in a process of its own. Figures are medians of the updates after the third:
the first proves the reload plan and the second checks it. Prints one JSON object; milliseconds. Of a rank: all of an
update (`rank`), its phases, and `step:` what phases are made of. Of the worker: all of an update (`worker`).
For a comparison run two versions in turn, several times, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank import make_receiver, named_tensors
from torch import multiprocessing
from workloads import WORKLOADS

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transfer import report

WARM_UP = 3
_SECONDS = 300


class CpuClock:
    """CPU time of this process by phase and by step; all its threads count."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = 0.0
        self._phase = "idle"

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        now = time.process_time()
        if self._phase != "idle":
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """A part of a phase."""
        begin = time.process_time()
        try:
            yield
        finally:
            self.seconds[f"step:{name}"] += time.process_time() - begin


@dataclass
class WatchedProgress(report.Progress):
    """Tells a clock of every phase."""

    clock: CpuClock | None = None

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "phase" and self.clock is not None:
            self.clock.enter(str(value))


def engine(workload: str, orders: Any, replies: Any) -> None:  # noqa: ANN401 - queues of another process
    """The worker: keeps its shards, and loads them tensor by tensor or by plan."""
    torch.set_num_threads(1)
    tensors = WORKLOADS[workload]()
    shards = {tensor.name: torch.zeros(tensor.shard_shape(1), dtype=torch.bfloat16) for tensor in tensors}
    dims = {tensor.name: tensor.dim for tensor in tensors}

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            shards[name].copy_(weight)

    receive = make_receiver(load, shards, dims, 0, None)
    replies.put(0.0)
    while (handle := orders.get()) is not None:
        begin = time.process_time()
        receive(handle)
        replies.put(time.process_time() - begin)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways, one after the other."""
    context = multiprocessing.get_context("spawn")
    orders, replies = context.Queue(), context.Queue()
    worker = context.Process(target=engine, args=(arguments.workload, orders, replies), daemon=True)
    worker.start()
    tensors = WORKLOADS[arguments.workload]()
    torch.set_num_threads(1)
    replies.get(timeout=_SECONDS)
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        server.register_checkpoint("bench", named_tensors=named_tensors(tensors, 0, 1))
        server.gather_metas("bench")
        ways = {}
        for way in arguments.ways:
            method, reload = way.split(":")

            def update(method: str = method, reload: str = reload) -> dict[str, float]:
                return one_update(server, orders.put, replies, method=method, reload=reload)

            runs = [update() for _ in range(WARM_UP + arguments.repeat)][WARM_UP:]
            ways[way] = {
                stage: round(statistics.median(run.get(stage, 0.0) for run in runs) * 1e3, 3) for stage in runs[-1]
            }
    orders.put(None)
    worker.join(_SECONDS)
    return {
        "workload": arguments.workload,
        "tensors": len(tensors),
        "updates": arguments.repeat,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "cpu_milliseconds": ways,
    }


def one_update(server: ParameterServer, tell: Callable[[str], None], replies: Any, **options: Any) -> dict[str, float]:  # noqa: ANN401 - see rank.py
    """One update; returns the seconds of CPU time that its parts took."""
    clock = CpuClock()
    server._updates.progress = WatchedProgress(clock=clock)  # noqa: SLF001 - it is watched from inside
    plain, report.StageClock.step = report.StageClock.step, lambda _self, name: clock.step(name)
    begin, wall = time.process_time(), time.perf_counter()
    try:
        server.update("bench", lambda handles: tell(handles[0][1]), **options)
    finally:
        report.StageClock.step = plain
    spent, passed = time.process_time() - begin, time.perf_counter() - wall
    return {"rank": spent, **clock.seconds, "worker": replies.get(timeout=_SECONDS), "wall": passed}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="moe30b-tiny")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--ways", nargs="+", default=["broadcast:auto", "direct:auto"], help="METHOD:RELOAD each")
    parser.add_argument("--output", type=Path, help="a file for the figures, besides standard output")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments), indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
