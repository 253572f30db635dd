"""What a machine's wires carry, all GPUs at once: JSON, in bytes a second of each GPU.

python benchmarks/ceilings.py --gpus 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import torch

SIZE = 2 << 30
ROUNDS = 4


def best_rate(nbytes: int, copy: Callable[[], object], gpus: Sequence[int]) -> float:
    """The highest of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        copy()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        best = min(best, time.perf_counter() - begin)
    return nbytes / best


def blocks(gpus: Sequence[int], nbytes: int = SIZE) -> list[torch.Tensor]:
    """One on each GPU."""
    return [torch.ones(nbytes, dtype=torch.uint8, device=f"cuda:{gpu}") for gpu in gpus]


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """At once, as far as they can be."""
    for target, source in zip(targets, sources, strict=True):
        with torch.cuda.device(target.device):
            target.copy_(source, non_blocking=True)


def host_to_device_rate(ranks: int) -> float:
    """Bytes a second into each GPU when all copy at once from pinned memory."""
    return bus_rates(ranks)["host_to_device"]


def bus_rates(ranks: int) -> dict[str, float]:
    """Bytes a second between each GPU and pinned memory, all at once: in, out, and each way of both at once."""
    gpus = range(min(ranks, torch.cuda.device_count()))
    host, other = ([torch.ones(SIZE, dtype=torch.uint8).pin_memory() for _ in gpus] for _ in range(2))
    targets, sources = blocks(gpus), blocks(gpus)
    outward = [torch.cuda.Stream(gpu) for gpu in gpus]

    def out() -> None:
        for stream, target, source in zip(outward, other, sources, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    def both() -> None:
        copy_all(targets, host)
        out()

    return {
        "host_to_device": best_rate(SIZE, lambda: copy_all(targets, host), gpus),
        "device_to_host": best_rate(SIZE, out, gpus),
        "both_ways": best_rate(SIZE, both, gpus),
    }


def device_rates(gpus: Sequence[int]) -> dict[str, float]:
    """Within a GPU, between neighbours, and of NCCL's broadcast."""
    sources, targets = blocks(gpus), blocks(gpus)
    rates = {"device": best_rate(SIZE, lambda: copy_all(targets, sources), gpus)}
    if len(gpus) > 1:
        neighbours = [*sources[1:], sources[0]]
        rates["peer"] = best_rate(SIZE, lambda: copy_all(targets, neighbours), gpus)
        rates["nccl_broadcast"] = best_rate(SIZE, lambda: torch.cuda.nccl.broadcast(targets), gpus)
    return rates


def processor_rate(ranks: int) -> float:
    """Without a GPU: bytes a second of copies in this process, shared by the ranks."""
    source, target = torch.ones(SIZE >> 4, dtype=torch.uint8), torch.empty(SIZE >> 4, dtype=torch.uint8)
    return best_rate(source.nbytes, lambda: target.copy_(source), ()) / ranks


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        rates = {"host_to_device": processor_rate(arguments.gpus)}
    else:
        rates = bus_rates(arguments.gpus)
        print(json.dumps({f"{name}_bytes_per_second": rate for name, rate in rates.items()}), flush=True)
        rates |= device_rates(range(arguments.gpus))
    print(json.dumps({f"{name}_bytes_per_second": rate for name, rate in rates.items()}), flush=True)


if __name__ == "__main__":
    main()
