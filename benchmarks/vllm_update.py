"""How long updates of a real `vllm serve` on a GPU take, from dummy weights and with CUDA graphs captured.

    python benchmarks/vllm_update.py moe30b --holes     a model of that size, made in /dev/shm

Then how long buckets take once they lie on the GPU, which is what vLLM's own loader compares with.

Needs vLLM and both packages in this environment. `vllm_formats.py` beside this shows that updates are right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from checkpoints import make_model
from vllm_server import serving, update
from workloads import WORKLOADS

from checkpoint_engine.server import ParameterServer

HERE = Path(__file__).parent
WAYS = ["broadcast:loader", "broadcast:auto", "direct:auto"]


def measure(arguments: argparse.Namespace) -> None:
    """Dummy start, then the same checkpoint again and again; the first update brings everything."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = make_model(arguments.workload, arguments.work / arguments.workload, holes=arguments.holes)
    nbytes = sum(tensor.nbytes for tensor in WORKLOADS[arguments.workload]())
    options = ["--load-format", "dummy", "--max-model-len", "256", "--max-num-seqs", "2"]
    options += ["--gpu-memory-utilization", "0.95", "--kv-cache-memory-bytes", str(1 << 30), *arguments.serve_options]
    started = time.perf_counter()
    with (
        serving([model], arguments.work, *options) as (server,),
        ParameterServer(rank=0, world_size=1, device="cuda") as ps,
    ):
        print(f"vLLM serves after {time.perf_counter() - started:.0f} s", flush=True)
        begin = time.perf_counter()
        in_place = not any(way.startswith("direct") for way in arguments.ways)
        files = sorted(model.glob("*.safetensors"))
        ps.register_checkpoint("bench", files=files, use_inplace_pin_memory=in_place)
        ps.gather_metas("bench")
        registered = time.perf_counter() - begin
        before = server.tokens()
        runs = []
        # One way after the other: what a worker keeps registered for direct updates goes with a broadcast.
        for way in (way for way in arguments.ways for _ in range(arguments.repeat)):
            free_before = server.rpc("checkpoint_engine_memory")
            begin = time.perf_counter()
            update(ps, server, "bench", way)
            wall = time.perf_counter() - begin
            report = ps.last_report
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
            "system": "checkpoint-engine-vllm",
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "vllm": server.rpc("checkpoint_engine_status")[0]["vllm"]},
            "bytes": nbytes,
            "tensors": ps.last_report.tensors,
            "staging": ps.last_report.staging,
            "seconds": {"register": registered},
            "updates": runs,
            "takeovers": takeovers,
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"vllm-{arguments.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    tensors, seconds = record["tensors"], record["seconds"]
    print(f"\n{arguments.workload}: {nbytes / 1e9:.1f} GB in {tensors} tensors into vLLM {record['versions']['vllm']}")
    for way in arguments.ways:
        # By plan, the first update of all is the proof and the second its check.
        of_way = [run for run in runs if run["way"] == way]
        print(f"{way}, first {of_way[0]['wall']:.3f} s; then, in medians:")
        for stage in ("connect", "copy", "load", "finish", "/pause", "/resume", "total", "wall"):
            values = [run[stage] for run in of_way[2:] or of_way if stage in run]
            if values and (value := statistics.median(values)):
                rate, each = nbytes / value / 1e9, value / tensors * 1e6
                print(f"{stage:12}{value:8.3f} s {rate:8.1f} GB/s {each:8.1f} µs a tensor")
    steps = ("begin", "load", "finish")
    medians = {step: statistics.median(takeover[step] for takeover in record["takeovers"]) for step in steps}
    medians["all"] = statistics.median(sum(takeover[step] for step in steps) for takeover in record["takeovers"])
    print(f"taking over {record['takeovers'][0]['buckets']} buckets on the GPU, in medians:")
    print("  ".join(f"{step} {value:.3f} s" for step, value in medians.items()))
    print(f"{'register':10}{seconds['register']:8.3f} s;  staging {record['staging']}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-bench"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("workload", choices=["moe30b", "moe15b", "dense32b"])
    parser.add_argument("--ways", nargs="+", default=WAYS, help="METHOD:RELOAD each")
    parser.add_argument("--holes", action="store_true", help="weights of zeros, which take no room in /dev/shm")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--serve-options", nargs="*", default=[])
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
