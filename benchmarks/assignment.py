"""Simulates who reads which bucket from whom, for 16, 256 and 4,096 GPUs: no network, no GPU, arithmetic only.

    uv run python benchmarks/assignment.py            # a table
    uv run python benchmarks/assignment.py --json

A fluid model: the reads on a card share its rate evenly, and what a read cannot use, because its other card is
slower, goes to the others; a receiver keeps four reads under way. Beside ours stands a plain round-robin: bucket i
goes from its first owner to receiver i modulo their number. "bound" is what no assignment can beat.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint_engine.planning.receivers import Assignment, Port, ReadLoad, assign_receivers, lower_bound

READS_AHEAD = 4
SHARING_ROUNDS = 4
NIC_RATE = 50e9
"""Bytes per second of one 400 Gbit/s card."""
BYTES = 1 << 40
"""One TiB: a model of a trillion parameters in FP8."""
BUCKET = 256 << 20

Assign = Callable[[Sequence[ReadLoad], Sequence[Port], Sequence[Port]], list[Assignment]]


@dataclass(frozen=True)
class Scenario:
    """Which ports there are, and who holds what."""

    name: str
    loads: list[ReadLoad]
    senders: list[Port]
    receivers: list[Port]


def scenarios(gpus: int) -> list[Scenario]:
    """As many sending GPUs as receiving ones, 8 on each host."""
    return [
        Scenario("one card a GPU", _held_once(gpus), _hosts("out", gpus, 8), _hosts("in", gpus, 8)),
        Scenario("a card for two GPUs", _held_once(gpus), _hosts("out", gpus, 4), _hosts("in", gpus, 4)),
        Scenario("3 cards on senders, 5 on receivers", _held_once(gpus), _hosts("out", gpus, 3), _hosts("in", gpus, 5)),
        Scenario("two replicas own all", _held_twice(gpus), _hosts("out", gpus, 8), _hosts("in", gpus, 8)),
        Scenario("senders hold 1 to 3 shares", _held_unevenly(gpus), _hosts("out", gpus, 8), _hosts("in", gpus, 8)),
        Scenario("8 GPUs join", _held_once(gpus), _hosts("out", gpus, 8), _hosts("in", 8, 8)),
    ]


def round_robin(loads: Sequence[ReadLoad], senders: Sequence[Port], receivers: Sequence[Port]) -> list[Assignment]:
    """The plainest assignment there is."""
    del senders
    return [Assignment(i, load.owners[0], i % len(receivers)) for i, load in enumerate(loads)]


def simulate(moves: Sequence[Assignment], scenario: Scenario) -> float:
    """Seconds until the last byte has arrived."""
    out, out_rate = _cards(scenario.senders)
    into, in_rate = _cards(scenario.receivers)
    queues: list[list[Assignment]] = [[] for _ in scenario.receivers]
    for move in reversed(moves):
        queues[move.receiver].append(move)
    slots = len(queues) * READS_AHEAD
    left = np.full(slots, np.inf)
    sender = np.zeros(slots, dtype=np.int64)
    receiver = np.repeat(np.array(into), READS_AHEAD)
    busy = np.zeros(slots, dtype=bool)

    def start(slot: int) -> None:
        queue = queues[slot // READS_AHEAD]
        busy[slot] = bool(queue)
        left[slot] = np.inf
        if queue:
            move = queue.pop()
            left[slot], sender[slot] = scenario.loads[move.load].nbytes, out[move.sender]

    for slot in range(slots):
        start(slot)
    now = 0.0
    while busy.any():
        rates = _shares(sender[busy], receiver[busy], out_rate, in_rate)
        step = float(np.min(left[busy] / rates))
        now += step
        left[busy] -= rates * step
        for slot in np.flatnonzero(left <= 1.0):  # bytes; what is left is rounding
            start(int(slot))
    return now


def measure(scenario: Scenario, assign: Assign) -> dict[str, float]:
    """Planning time on this machine, simulated transfer time."""
    started = time.perf_counter()
    moves = assign(scenario.loads, scenario.senders, scenario.receivers)
    planned = time.perf_counter() - started
    return {"planning_s": planned, "transfer_s": simulate(moves, scenario)}


def main() -> None:
    """Runs all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="*", default=[16, 256, 4096])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for gpus in options.gpus:
        for scenario in scenarios(gpus):
            bound = lower_bound(scenario.loads, scenario.senders, scenario.receivers)
            ours, plain = measure(scenario, assign_receivers), measure(scenario, round_robin)
            rows.append({"gpus": gpus, "scenario": scenario.name, "bound_s": bound, "ours": ours, "round_robin": plain})
    if options.json:
        print(json.dumps({"simulated": True, "bytes": BYTES, "nic_bytes_per_s": NIC_RATE, "rows": rows}, indent=1))
        return
    print("simulated, 1 TiB, cards of 50 GB/s\n")
    print("| GPUs | | bound | ours | of the bound | round-robin | planning |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for row in rows:
        bound, ours, plain = row["bound_s"], row["ours"], row["round_robin"]
        print(
            f"| {row['gpus']:,} | {row['scenario']} | {bound:.3f} s | {ours['transfer_s']:.3f} s | "
            f"{ours['transfer_s'] / bound:.2f} | {plain['transfer_s']:.3f} s | {ours['planning_s'] * 1e3:.0f} ms |"
        )


def _hosts(side: str, gpus: int, cards: int) -> list[Port]:
    return [Port(f"{side}/{gpu // 8}/{gpu % 8 * cards // 8}", NIC_RATE) for gpu in range(gpus)]


def _sizes(gpus: int) -> list[int]:
    """Buckets are cut at tensors, so they vary; a rank's last one is what is left."""
    noise = random.Random(7)
    count = max(BYTES // BUCKET, 4 * gpus)
    sizes = [noise.uniform(0.7, 1.0) for _ in range(count)]
    return [int(size * BYTES / sum(sizes)) for size in sizes]


def _held_once(gpus: int) -> list[ReadLoad]:
    return [ReadLoad(nbytes, (i % gpus,)) for i, nbytes in enumerate(_sizes(gpus))]


def _held_twice(gpus: int) -> list[ReadLoad]:
    half = gpus // 2
    return [ReadLoad(nbytes, (i % half, half + i * 5 % half)) for i, nbytes in enumerate(_sizes(gpus))]


def _held_unevenly(gpus: int) -> list[ReadLoad]:
    owners = [gpu for gpu in range(gpus) for _ in range(1 + gpu % 3)]
    return [ReadLoad(nbytes, (owners[i % len(owners)],)) for i, nbytes in enumerate(_sizes(gpus))]


def _shares(sender: np.ndarray, receiver: np.ndarray, out_rate: np.ndarray, in_rate: np.ndarray) -> np.ndarray:
    """Rates of the reads: what one card leaves over because the other is slower goes to its other reads."""
    reads_out = np.bincount(sender, minlength=len(out_rate)).clip(1)
    reads_in = np.bincount(receiver, minlength=len(in_rate)).clip(1)
    rates = np.zeros(len(sender))
    for _ in range(SHARING_ROUNDS):
        spare_out = out_rate - np.bincount(sender, rates, len(out_rate))
        spare_in = in_rate - np.bincount(receiver, rates, len(in_rate))
        rates += np.minimum((spare_out / reads_out)[sender], (spare_in / reads_in)[receiver])
    return rates


def _cards(ports: Sequence[Port]) -> tuple[list[int], np.ndarray]:
    """Each port's card, and the cards' rates."""
    rates = {port.nic: port.rate for port in ports}
    places = {nic: place for place, nic in enumerate(rates)}
    return [places[port.nic] for port in ports], np.array(list(rates.values()))


if __name__ == "__main__":
    main()
