"""What one step of reinforcement learning costs with a real SGLang: ours, and SGLang's own update from tensors.

    python benchmarks/rl_step_sglang.py moe30b --systems tensors device host

Trainer and engine share a GPU, and one engine takes all systems in turn. Every step draws all weights anew (those of
three seeds, one after the other) and brings them over with pause, cache and resume. `tensors` is what SGLang's users
do today: buckets of one flat GiB by CUDA IPC, over `/update_weights_from_tensor`. What the engine holds is compared by
SGLang's own checksums of all parameters, with those of the first system that brought weights of that seed: name one
that is SGLang's own first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from checkpoints import configuration, make_tokenizer
from engine_trainer import SECONDS, UNCOUNTED, TimedEndpoint, Trainer
from sglang_server import Server, serving
from workloads import WORKLOADS, Tensor

HERE = Path(__file__).parent
SEEDS = 3
BUCKET_BYTES = 1 << 30
Checksums = list[dict[str, str]]


@dataclass(kw_only=True)
class SGLangTrainer(Trainer):
    """Brings its weights by SGLang's own update from tensors, too."""

    server: Server

    def buckets(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """All weights, in pieces of a size that trainers choose."""
        bucket: list[tuple[str, torch.Tensor]] = []
        room = BUCKET_BYTES
        for name, weight in self.weights.items():
            if bucket and weight.nbytes > room:
                yield bucket
                bucket, room = [], BUCKET_BYTES
            bucket.append((name, weight))
            room -= weight.nbytes
        yield bucket

    def tensors(self) -> Callable[[int], None]:
        """A step by SGLang's own way."""
        from sglang.srt.utils import MultiprocessingSerializer  # noqa: PLC0415 - of one system only
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions  # noqa: PLC0415
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # noqa: PLC0415

        monkey_patch_torch_reductions()
        client = httpx.Client(base_url=self.server.url, timeout=SECONDS)

        def post(path: str, **body: object) -> None:
            reply = client.post(path, json=body)
            if not reply.is_success:
                raise SystemExit(f"{path}: {reply.status_code} {reply.text[:2000]}")

        def send() -> None:
            for bucket in self.buckets():
                flat = FlattenedTensorBucket(named_tensors=bucket)
                both = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
                given = [MultiprocessingSerializer.serialize(both, output_str=True)] * self.workers
                post(
                    "/update_weights_from_tensor",
                    serialized_named_tensors=given,
                    load_format="flattened_bucket",
                    flush_cache=False,
                )

        def step(_: int) -> None:
            self.lap("pause", lambda: post("/pause_generation", mode="retract"))
            self.lap("flush", self.server.flush)
            self.lap("send", send)
            self.lap("resume", lambda: post("/continue_generation"))

        return step


def run(
    system: str, trainer: SGLangTrainer, steps: int, sums: dict[int, Checksums], rows: list[dict[str, Any]]
) -> None:
    """The steps of one system; `sums` are what the engine held of each seed's weights."""
    step, tell = (trainer.tensors(), dict) if system == "tensors" else trainer.ours(system)
    for number in range(steps):
        seed = number % SEEDS
        trainer.change(seed)
        begin = time.perf_counter()
        step(number)
        seconds = {**trainer.laps, "whole": time.perf_counter() - begin}
        held = trainer.server.checksums()
        right = sums.setdefault(seed, held) == held and all(sums[other] != held for other in sums.keys() - {seed})
        free = torch.cuda.mem_get_info()[0]
        rows.append({"system": system, "step": number, "seconds": seconds, "right": right, "free": free, **tell()})
        shown = {name: round(value, 4) for name, value in seconds.items()}
        told = {name: rows[-1].get(name, {}) for name in ("stages", "requests", "phases")}
        print(f"  {system:16} {number:3} {json.dumps(shown)} {json.dumps(told)}", flush=True)
        if not right:
            raise SystemExit(f"{system}: the engine holds something else than after the first system's step")
    trainer.lap("close", trainer.close)
    print(f"  {system:16} weights let go of in {trainer.laps['close']:.1f} s", flush=True)
    trainer.laps.clear()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["moe30b", "moe15b", "dense32b", "moe-small"])
    parser.add_argument("--systems", nargs="+", default=["tensors", "device", "host"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-bench"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="workers, on a GPU each")
    parser.add_argument("--trace", action="store_true", help="say what was done when within each step")
    parser.add_argument("--serve-options", default="", help="more options of SGLang, in one string")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29613")
    torch.cuda.set_device(0)
    tensors = WORKLOADS[arguments.workload]()
    model = arguments.work / arguments.workload
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(configuration(tensors)))
    make_tokenizer(model)
    record: dict[str, Any] = {
        "workload": arguments.workload,
        "engine": "sglang",
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "tensors": len(tensors),
        "gpus": arguments.tensor_parallel_size,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "sglang": version("sglang")},
        "steps": {},
    }
    measure(tensors, model, record, arguments)
    show(record)


def measure(tensors: list[Tensor], model: Path, record: dict[str, Any], arguments: argparse.Namespace) -> None:
    """All systems into one engine; what is there so far is kept after each."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"rl-step-sglang-{arguments.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    options = ["--load-format", "dummy", "--tp-size", str(arguments.tensor_parallel_size)]
    started = time.perf_counter()
    with serving([model], arguments.work, *options, *arguments.serve_options.split()) as (server,):
        print(f"SGLang serves after {time.perf_counter() - started:.0f} s", flush=True)
        server.client.endpoint = timed = TimedEndpoint(server.url)
        weights = {t.name: torch.empty(t.shape, dtype=torch.bfloat16, device="cuda") for t in tensors}
        asked = {"client": server.client, "requests": timed.seconds, "traced": arguments.trace}
        trainer = SGLangTrainer(weights=weights, server=server, workers=arguments.tensor_parallel_size, **asked)
        sums: dict[int, Checksums] = {}
        for system in arguments.systems:
            run(system, trainer, arguments.steps, sums, record["steps"].setdefault(system, []))
            path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"  {server.tokens()[0]}; CUDA graphs captured {server.graphs()} times", flush=True)


def show(record: dict[str, Any]) -> None:
    """Prints a table."""
    size = f"{record['bytes'] / 1e9:.1f} GB in {record['tensors']} tensors"
    print(f"\n{record['workload']}: {size} into SGLang {record['versions']['sglang']}, {record['device']}")
    for system, rows in record["steps"].items():
        whole = statistics.median(row["seconds"]["whole"] for row in rows[UNCOUNTED:] or rows)
        print(f"{system:16} whole {whole:7.3f} s   first {rows[0]['seconds']['whole']:7.3f} s")


if __name__ == "__main__":
    main()
