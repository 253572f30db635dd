"""One trainer, and a stand-in engine on the same device, for `rl_step.py`: new weights every step.

    python benchmarks/trainer.py SYSTEM WORKLOAD DEVICE STEPS

It runs on whichever `checkpoint_engine` is on the path. Every step changes every byte, brings the weights over, and has
the engine compare all it holds with what it should. Prints one line of JSON a step.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rank import make_receiver, system_name
from torch import multiprocessing
from workloads import WORKLOADS, Tensor

PERIOD = 251
ANSWER_SECONDS = 300.0


def byte_of(index: int, step: int) -> int:
    """What every byte of a tensor is after a step; neighbours and successive steps differ."""
    return (index * 7 + step * 13) % PERIOD


def engine(workload: str, device: str, orders: queue.Queue[Any], replies: queue.Queue[Any]) -> None:
    """A stand-in for an engine's worker: parameters as the checkpoint has them."""
    gpu = 0 if device == "cuda" else None
    place = torch.device(device, gpu) if gpu is not None else torch.device("cpu")
    tensors = WORKLOADS[workload]()
    held = {t.name: torch.zeros(t.shape, dtype=torch.bfloat16, device=place) for t in tensors}

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            held[name].copy_(weight, non_blocking=True)
        if gpu is not None:
            torch.cuda.synchronize()

    receive = make_receiver(load, held, {t.name: t.dim for t in tensors}, 0, gpu)
    replies.put("ready")
    while (order := orders.get()) is not None:
        if isinstance(order, int):
            wrong = ((held[t.name].view(torch.uint8) != byte_of(index, order)).sum() for index, t in enumerate(tensors))
            replies.put(int(sum(wrong)))
            continue
        try:
            receive(order)
            replies.put("")
        except Exception as error:  # noqa: BLE001 - the trainer shows it
            replies.put(f"{type(error).__name__}: {error}")


@dataclass
class Trainer:
    """Weights that change, and what takes them over."""

    tensors: list[Tensor]
    weights: dict[str, torch.Tensor]
    ask: Callable[[list[tuple[str, str]]], None]
    server: Any
    laps: dict[str, float] = field(default_factory=dict)
    """Seconds of the parts of a step."""

    def change(self, step: int) -> None:
        """Trains."""
        for index, tensor in enumerate(self.tensors):
            self.weights[tensor.name].view(torch.uint8).fill_(byte_of(index, step))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def lap(self, name: str, work: Callable[[], object]) -> None:
        """Does one part of a step."""
        begin = time.perf_counter()
        work()
        self.laps[name] = time.perf_counter() - begin

    def publish(self, step: int, *, in_place: bool, method: str = "direct") -> None:
        """Ours, in one call: the weights stay where they are, or go through host memory while they are sent."""
        options = {"version": f"step-{step}", "method": method, "in_place": in_place}
        self.lap("update", lambda: self.server.publish(self.weights, self.ask, **options))

    def host_memory(self, step: int, method: str) -> None:
        """Ours, call by call, as upstream's users do it."""
        name = f"step-{step}"
        pooled = {"named_tensors": self.weights, "use_shared_memory_pool": True}
        self.lap("register", lambda: self.server.register_checkpoint(name, **pooled))
        self.lap("gather", lambda: self.server.gather_metas(name))
        self.lap("update", lambda: self.server.update(name, self.ask, method=method))
        self.lap("unregister", lambda: self.server.unregister_checkpoint(name))

    def upstream(self, step: int) -> None:
        """Upstream's way of the same."""
        del step
        pooled = {"named_tensors": self.weights, "use_shared_memory_pool": True}
        self.lap("register", lambda: self.server.register_checkpoint("step", **pooled))
        self.lap("gather", lambda: self.server.gather_metas("step"))
        self.lap("update", lambda: self.server.update("step", self.ask))
        self.lap("unregister", lambda: self.server.unregister_checkpoint("step"))


def main() -> None:
    """Runs the steps."""
    system, workload, device, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print as they please; answers keep the pipe for themselves
    from checkpoint_engine.ps import ParameterServer  # noqa: PLC0415 - the system under test

    context = multiprocessing.get_context("spawn")
    orders, replies = context.Queue(), context.Queue()
    where = "cuda" if device == "cuda" else "cpu"
    worker = context.Process(target=engine, args=(workload, where, orders, replies), daemon=True)
    worker.start()
    tensors = WORKLOADS[workload]()
    source = "cpu" if system.endswith("-cpu") or device == "cpu" else "cuda"
    weights = {t.name: torch.empty(t.shape, dtype=torch.bfloat16, device=source) for t in tensors}
    if source == "cpu":
        for weight in weights.values():
            weight.share_memory_()
    replies.get(timeout=ANSWER_SECONDS)
    server = ParameterServer(auto_pg=True)
    if system.startswith("upstream"):
        server.init_process_group()
    trainer = Trainer(tensors, weights, lambda handles: orders.put(handles[0][1]), server)
    ways: dict[str, Callable[[int], None]] = {
        "device": lambda step: trainer.publish(step, in_place=True),
        "host": lambda step: trainer.publish(step, in_place=False),
        "host-direct": lambda step: trainer.host_memory(step, "direct"),
        "host-broadcast": lambda step: trainer.host_memory(step, "broadcast"),
        "upstream": trainer.upstream,
    }
    for step in range(steps):
        trainer.change(step)
        begin = time.perf_counter()
        ways[system.removesuffix("-cpu")](step)
        whole = time.perf_counter() - begin
        failure = replies.get(timeout=ANSWER_SECONDS)
        orders.put(step)
        wrong = replies.get(timeout=ANSWER_SECONDS)
        free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
        report = getattr(server, "last_report", None)
        row = {
            "system": system,
            "implementation": system_name(),
            "step": step,
            "seconds": {**trainer.laps, "whole": whole},
            "stages": {} if report is None else {name: round(value, 4) for name, value in report.seconds.items()},
            "failure": failure,
            "wrong_bytes": wrong,
            "device_bytes_used": total - free,
        }
        print(json.dumps(row), file=answer, flush=True)
    orders.put(None)
    worker.join(30)


if __name__ == "__main__":
    main()
