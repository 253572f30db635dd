"""Whether a real `vllm serve` on a GPU that sleeps takes updates as it should, at both levels; and what memory it has.

    python benchmarks/vllm_sleep.py [--large] [--work DIR]

Needs one GPU, vLLM (0.26 and newer) and both packages in this environment; takes about three minutes. Two servers of a
tiny dense model: one with A sleeps and is updated, one with B is what it must become. For each level and way: an update
of sleeping weights is refused by name; then weights alone are woken, the update comes while the cache sleeps on, the
cache is woken, and hashes of all parameters and greedy tokens are those of a cold start. Exits with 1 if anything is
not so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from senders import Senders
from vllm_formats import MAKER, PLAIN, differences
from vllm_server import Server, serving

from checkpoint_engine.errors import CheckpointEngineError

WAYS = ("broadcast:auto", "broadcast:auto", "direct:auto", "broadcast:loader")
OPTIONS = ("--enable-sleep-mode", "--kv-cache-memory-bytes", str(1 << 30), "--max-model-len", "256")
OPTIONS += ("--max-num-seqs", "4", "--gpu-memory-utilization", "0.1", *PLAIN)


def free() -> float:
    """GB of the GPU that nobody has."""
    return torch.cuda.mem_get_info()[0] / 1e9


def refused(senders: Senders, server: Server, name: str) -> str:
    """What is wrong with how an update of sleeping weights ends; empty if it is refused as it should."""
    try:
        senders.update(server.client, name, "broadcast:auto")
    except CheckpointEngineError as error:
        return "" if "weights sleep" in str(error) else f"refused otherwise: {error}"
    return "taken while its weights slept"


def asleep(senders: Senders, server: Server, level: int, path: Path, way: str, cold: dict[str, Any]) -> str:
    """One update around which an engine sleeps; what went wrong, if anything did."""
    memory = {"awake": free()}
    server.post(f"/sleep?level={level}")
    memory["asleep"] = free()
    wrong = refused(senders, server, path.name)
    server.post("/wake_up?tags=weights")
    memory["weights awake"] = free()
    senders.update(server.client, path.name, way)
    memory["updated, cache asleep"] = free()
    server.post("/wake_up?tags=kv_cache")
    wrong = wrong or differences(server.state(), cold)
    figures = ", ".join(f"{what} {gigabytes:.2f}" for what, gigabytes in memory.items())
    print(f"level {level}, {way} to {path.name}: {wrong or 'equal'}; GB free: {figures}", flush=True)
    return wrong


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vllm-sleep")
    parser.add_argument("--port", type=int, default=8100)
    arguments = parser.parse_args()
    made = [sys.executable, str(MAKER), str(arguments.work), "qwen3", "qwen3-b", *["--large"] * arguments.large]
    subprocess.run(made, check=True, timeout=200)
    a, b = arguments.work / "qwen3", arguments.work / "qwen3-b"
    found: list[str] = []
    with (
        serving([a, b], arguments.work, *OPTIONS, port=arguments.port) as (server, other),
        Senders(1, port=arguments.port + 500) as senders,
    ):
        for path in (a, b):
            senders.register(path, in_place=False)
        cold = {a: server.state(), b: other.state()}
        for level in (1, 2):
            for number, way in enumerate(WAYS):
                path = (b, a)[number % 2]
                found.append(asleep(senders, server, level, path, way, cold[path]))
    sys.exit(1 if any(found) else 0)


if __name__ == "__main__":
    main()
