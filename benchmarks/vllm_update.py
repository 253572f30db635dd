"""How long updates of a real `vllm serve` on a GPU take, from dummy weights and with CUDA graphs captured.

    python benchmarks/vllm_update.py moe30b --holes                a model of that size, made in /dev/shm
    python benchmarks/vllm_update.py moe30b --holes --workers 2    the same, tensor-parallel on two GPUs

Then how long buckets take once they lie on the GPU, which is what vLLM's own loader compares with.

Needs vLLM and both packages in this environment. `vllm_formats.py` beside this shows that updates are right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_model
from measured import register, save, show_ways
from senders import Senders
from vllm_server import serving
from workloads import WORKLOADS

HERE = Path(__file__).parent
PORT = 8600
WAYS = ["broadcast:loader", "broadcast:auto", "direct:auto"]


def measure(arguments: argparse.Namespace) -> None:
    """Dummy start, then the same checkpoint again and again; the first update brings everything."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = make_model(arguments.workload, arguments.work / arguments.workload, holes=arguments.holes)
    nbytes = sum(tensor.nbytes for tensor in WORKLOADS[arguments.workload]())
    options = ["--load-format", "dummy", "--max-model-len", "256", "--max-num-seqs", "2"]
    options += ["--gpu-memory-utilization", "0.95", "--kv-cache-memory-bytes", str(1 << 30)]
    options += ["--tensor-parallel-size", str(arguments.workers), *arguments.serve_options.split()]
    started = time.perf_counter()
    with (
        serving([model], arguments.work, *options) as (server,),
        Senders(arguments.workers, port=PORT) as senders,
    ):
        print(f"vLLM serves after {time.perf_counter() - started:.0f} s", flush=True)
        registered = register(senders, model, arguments.ways)
        before = server.tokens()
        runs = []
        # One way after the other: what a worker keeps registered for direct updates goes with a broadcast.
        for way in (way for way in arguments.ways for _ in range(arguments.repeat)):
            free_before = server.rpc("checkpoint_engine_memory")
            begin = time.perf_counter()
            senders.update(server.client, model.name, way)
            wall = time.perf_counter() - begin
            report = senders.last_report
            asked = {path: seconds for path, seconds in server.timed.seconds.items() if path != "/health"}
            runs.append({"way": way, "wall": wall, **report.seconds, **asked, "free_before": free_before})
            runs[-1] |= report.engine
            print(json.dumps(runs[-1]), flush=True)
        if server.tokens() == before:
            raise SystemExit("the update changed nothing")
        # Last: it leaves nonsense as weights. What lies on the GPU waits for nothing but the engine.
        takeovers = [server.rpc("checkpoint_engine_takeover")[0] for _ in range(arguments.repeat)]
        record = {
            "workload": arguments.workload,
            "ways": arguments.ways,
            "workers": arguments.workers,
            "system": "checkpoint-engine-vllm",
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "vllm": server.rpc("checkpoint_engine_status")[0]["vllm"]},
            "bytes": nbytes,
            "tensors": senders.last_report.tensors,
            "staging": senders.last_report.staging,
            "seconds": {"register": registered},
            "updates": runs,
            "takeovers": takeovers,
        }
    save(record, arguments.output, "vllm")
    show(record)


def show(record: dict[str, Any]) -> None:
    """Prints a table."""
    nbytes, tensors, version = record["bytes"], record["tensors"], record["versions"]["vllm"]
    print(f"\n{record['workload']}: {nbytes / 1e9:.1f} GB in {tensors} tensors into vLLM {version}", end="")
    print(f" with {record['workers']} workers on {record['device']}")
    show_ways(record, "/pause", "/resume")
    steps = ("begin", "load", "finish")
    medians = {step: statistics.median(takeover[step] for takeover in record["takeovers"]) for step in steps}
    medians["all"] = statistics.median(sum(takeover[step] for step in steps) for takeover in record["takeovers"])
    print(f"taking over {record['takeovers'][0]['buckets']} buckets on the GPU, in medians:")
    print("  ".join(f"{step} {value:.3f} s" for step, value in medians.items()))
    print(f"register {record['seconds']['register']:.3f} s; staging {record['staging']}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-bench"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("workload", choices=["moe30b", "moe15b", "dense32b"])
    parser.add_argument("--ways", nargs="+", default=WAYS, help="METHOD:RELOAD each")
    parser.add_argument("--holes", action="store_true", help="weights of zeros, which take no room in /dev/shm")
    parser.add_argument("--workers", type=int, default=1, help="tensor-parallel, a GPU each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--serve-options", default="", help="more options of vllm serve, in one string")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
