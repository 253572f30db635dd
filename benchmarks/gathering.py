"""How long ranks of one host take to tell each other what they hold: `gather_metas`, and a barrier.

    python benchmarks/gathering.py [--ranks 8] [--tensors 140000] [--repeat 10]

Each rank is a process and holds its share of tiny tensors. Prints one JSON object: medians and extremes in
milliseconds, of the slowest rank each time. For a comparison run two versions in turn on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from typing import Any

import torch
from torch import multiprocessing

from checkpoint_engine.ps import ParameterServer

_SECONDS = 300


def rank_process(rank: int, arguments: argparse.Namespace, port: int, results: Any) -> None:  # noqa: ANN401 - a queue
    """One rank: registers its share, then gathers again and again."""
    torch.set_num_threads(1)
    share = {
        f"model.layers.{i}.mlp.experts.{i % 128}.up_proj.weight": torch.zeros(1, dtype=torch.bfloat16)
        for i in range(rank, arguments.tensors, arguments.ranks)
    }
    server = ParameterServer(
        rank=rank, world_size=arguments.ranks, master_addr="127.0.0.1", master_port=port, device="cpu"
    )
    with server:
        server.register_checkpoint("bench", named_tensors=share)
        for what, call in (("metas", lambda: server.gather_metas("bench")), ("barrier", server.store_based_barrier)):
            for _ in range(arguments.repeat + 1):
                server.store_based_barrier()
                begin = time.perf_counter()
                call()
                results.put((what, time.perf_counter() - begin))
            server.store_based_barrier()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tensors", type=int, default=140_000)
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_process, args=(rank, arguments, port, results)) for rank in range(arguments.ranks)
    ]
    for process in ranks:
        process.start()
    figures: dict[str, Any] = {"ranks": arguments.ranks, "tensors": arguments.tensors, "cpus": os.cpu_count()}
    for what in ("metas", "barrier"):
        rounds: list[float] = []
        for _ in range(arguments.repeat + 1):
            taken = [results.get(timeout=_SECONDS) for _ in ranks]
            rounds.append(1e3 * max(seconds for _, seconds in taken))
        del rounds[0]
        figures[what] = {
            "median": round(statistics.median(rounds), 2),
            "min": round(min(rounds), 2),
            "max": round(max(rounds), 2),
        }
    for process in ranks:
        process.join(_SECONDS)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
