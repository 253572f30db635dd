"""How long updates of a real SGLang on a GPU take, from dummy weights and with CUDA graphs captured.

    python benchmarks/sglang_update.py moe30b --holes                a model of that size, made in /dev/shm
    python benchmarks/sglang_update.py moe30b --holes --workers 2    the same, tensor-parallel on two GPUs
    python benchmarks/sglang_update.py moe-small --device cpu        1.4 GB, to see that this script works

Needs SGLang and both packages in this environment. `sglang_formats.py` beside this shows that updates are right.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_model
from measured import register, save, show_ways
from senders import Senders
from sglang_server import serving
from workloads import WORKLOADS

HERE = Path(__file__).parent
PORT = 31600
WAYS = ["broadcast:loader", "broadcast:auto", "direct:auto"]


def measure(arguments: argparse.Namespace) -> None:
    """Dummy start, then the same checkpoint again and again; the first update brings everything."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = make_model(arguments.workload, arguments.work / arguments.workload, holes=arguments.holes)
    nbytes = sum(tensor.nbytes for tensor in WORKLOADS[arguments.workload]())
    options = ["--mem-fraction-static", "0.9", "--tp-size", str(arguments.workers), *arguments.serve_options.split()]
    started = time.perf_counter()
    with (
        serving([], arguments.work, *options, closed=model, device=arguments.device) as (server,),
        Senders(arguments.workers, device=arguments.device, port=PORT) as senders,
    ):
        print(f"SGLang can be updated after {time.perf_counter() - started:.0f} s", flush=True)
        registered = register(senders, model, arguments.ways)
        runs, tokens = [], None
        # One way after the other: what a worker keeps registered for direct updates goes with a broadcast.
        for way in (way for way in arguments.ways for _ in range(arguments.repeat)):
            begin = time.perf_counter()
            senders.update(server.client, model.name, way)
            wall = time.perf_counter() - begin
            report = senders.last_report
            runs.append({"way": way, "wall": wall, **report.seconds, **report.engine})
            print(json.dumps(runs[-1]), flush=True)
            before, tokens = tokens, server.tokens()
            if before not in (None, tokens):
                raise SystemExit("the same weights generate something else")
        record = {
            "workload": arguments.workload,
            "ways": arguments.ways,
            "workers": arguments.workers,
            "system": "checkpoint-engine-sglang",
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "sglang": server.status()["sglang"]},
            "graphs": server.graphs(),
            "bytes": nbytes,
            "tensors": senders.last_report.tensors,
            "staging": senders.last_report.staging,
            "seconds": {"register": registered},
            "updates": runs,
        }
    save(record, arguments.output, "sglang")
    show(record)


def show(record: dict[str, Any]) -> None:
    """Prints a table."""
    nbytes, tensors, version = record["bytes"], record["tensors"], record["versions"]["sglang"]
    print(f"\n{record['workload']}: {nbytes / 1e9:.1f} GB in {tensors} tensors into SGLang {version}", end="")
    print(f" with {record['workers']} workers on {record['device']}")
    show_ways(record)
    registered, staging, graphs = record["seconds"]["register"], record["staging"], record["graphs"]
    print(f"register {registered:.3f} s; staging {staging}; graphs captured {graphs} times")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-bench"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("workload", choices=["moe30b", "moe15b", "dense32b", "moe-small"])
    parser.add_argument("--ways", nargs="+", default=WAYS, help="METHOD:RELOAD each")
    parser.add_argument("--holes", action="store_true", help="weights of zeros, which take no room in /dev/shm")
    parser.add_argument("--workers", type=int, default=1, help="tensor-parallel, a GPU each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--serve-options", default="", help="more options of SGLang, in one string")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
