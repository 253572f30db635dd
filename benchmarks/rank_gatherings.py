"""What the ranks' control plane costs rank 0: real hub, real spokes, encrypted as between hosts, by number of ranks.

    python benchmarks/rank_gatherings.py [--ranks 16 32 64 128] [--nbytes 0 300 2800] [--rounds 10]

All ranks gather `nbytes` bytes each, as they do four times in an update (0 and some 300) and once in `gather_metas`
(2,800 for a checkpoint of 140,000 tensors on 4,096 ranks). The hub has a process of its own; CPU seconds are those of
that process (`process`) and of the hub's thread in it (`hub`), which nothing runs beside: what it costs is what all
wait for. Prints one JSON object: milliseconds for each gathering, medians.
"""

from __future__ import annotations

import argparse
import json
import secrets
import socket
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import cast

from torch import multiprocessing

from checkpoint_engine.collective.control_plane import ControlPlane
from checkpoint_engine.collective.meeting import BetweenHosts
from checkpoint_engine.collective.rank_messages import Call
from checkpoint_engine.collective.spoke import Spoke
from checkpoint_engine.deadline import Deadline

_SECONDS = 120.0


def _plane(rank: int, ranks: int, port: int, secret: bytes) -> ControlPlane:
    return ControlPlane(rank, ranks, BetweenHosts("benchmark", "127.0.0.1", port, secret, lambda _: None))


def _spoke(plane: ControlPlane) -> Spoke:
    spoke = plane._spoke  # noqa: SLF001 - one thread asks for many ranks, as no user of a board can
    if spoke is None:
        raise SystemExit("a rank that is alone has nothing to gather")
    return spoke


def be_ranks(pipe: Connection, ranks: int, port: int, secret: bytes) -> None:
    """All ranks but rank 0: gathers what it is told to, until it is told nothing."""
    planes = [_plane(rank, ranks, port, secret) for rank in range(1, ranks)]
    for plane in planes:
        plane.wait_until_connected(Deadline(_SECONDS))
    pipe.send("connected")
    while (order := cast("tuple[str, int] | None", pipe.recv())) is not None:
        key, nbytes = order
        asked = [_spoke(plane).ask(Call.GATHER, key, secrets.token_bytes(nbytes)) for plane in planes]
        complete = [pending.wait(_SECONDS) for pending in asked]
        pipe.send(all(answer is not None for answer in complete))
    for plane in planes:
        plane.close()


def measure(ranks: int, sizes: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a gathering by size of what each rank brings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secret = secrets.token_bytes(32)
    here, there = multiprocessing.Pipe()
    others = multiprocessing.get_context("spawn").Process(target=be_ranks, args=(there, ranks, port, secret))
    plane = _plane(0, ranks, port, secret)
    others.start()
    if here.recv() != "connected":
        raise SystemExit("the ranks did not connect")
    hub = next(thread for thread in threading.enumerate() if thread.name == "checkpoint-engine-hub")
    clock = time.pthread_getcpuclockid(cast("int", hub.ident))
    found: dict[str, dict[str, float]] = {}
    for nbytes in sizes:
        taken: dict[str, list[float]] = {"wall": [], "hub": [], "process": []}
        for number in range(rounds):
            before = time.perf_counter(), time.clock_gettime(clock), time.process_time()
            here.send((f"{nbytes}/{number}", nbytes))
            mine = _spoke(plane).ask(
                Call.GATHER, f"{nbytes}/{number}", secrets.token_bytes(nbytes), members=tuple(range(ranks))
            )
            if mine.wait(_SECONDS) is None or not here.recv():
                raise SystemExit("a gathering did not end")
            after = time.perf_counter(), time.clock_gettime(clock), time.process_time()
            for name, begin, end in zip(taken, before, after, strict=True):
                taken[name].append(1e3 * (end - begin))
        found[str(nbytes)] = {name: round(statistics.median(times), 2) for name, times in taken.items()}
    here.send(None)
    others.join(_SECONDS)
    plane.close()
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--nbytes", type=int, nargs="+", default=[0, 300, 2800])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(json.dumps({str(ranks): measure(ranks, options.nbytes, options.rounds) for ranks in options.ranks}, indent=1))


if __name__ == "__main__":
    main()
