"""What one step of reinforcement learning costs with a real vLLM: ours, and vLLM's own `ipc` weight transfer.

    python benchmarks/rl_step_vllm.py moe30b --systems device host-direct ipc ipc-ours ipc-ours-8

Trainer and engine share a GPU; with `--tensor-parallel-size 2` the engine has the next one too, and `device` and `host`
bring over NVLink what is kept there. Every step draws all weights anew, brings them over with pause, caches and resume,
and compares the sum of all bit patterns that the engine's parameters hold with the trainer's. `ipc` packs its tensors,
over vLLM's own routes; in vLLM 0.26 its module imports `ray`, of which it needs nothing: an empty module does.
`native` is `device` through our backend `checkpoint_engine` of vLLM's weight transfer, over vLLM's own routes.
`ipc-ours` is the same trainer of vLLM's, sending to our backend `checkpoint_engine_ipc`; a number behind either says
how many GiB the trainer packs at a time, where vLLM's default is one. Where the engine quantises what it gets
(`--serve-options "--quantization fp8_per_channel"`), its sum is compared with that of the first system of the run,
after the same step: name one that is vLLM's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch
from checkpoints import configuration, make_tokenizer
from engine_trainer import SECONDS, UNCOUNTED, Trainer
from vllm_server import Server, serving
from workloads import WORKLOADS, Tensor

HERE = Path(__file__).parent


@dataclass(kw_only=True)
class VllmTrainer(Trainer):
    """Brings its weights by vLLM's own `ipc` trainer, too, and by our backend of vLLM's weight transfer."""

    server: Server
    native: bool = False

    def ask(self, version: str) -> Callable[[list[tuple[str, str]]], None]:
        """What asks the engine for an update; the native backend by vLLM's own routes."""
        if not self.native:
            return super().ask(version)

        def update(handles: list[tuple[str, str]]) -> None:
            self.post("/pause", mode="keep")
            self.post("/start_weight_update")
            self.post("/update_weights", {"update_info": {"handles": dict(handles), "version": version}})
            self.post("/finish_weight_update")
            self.post("/resume")

        return update

    @cached_property
    def post(self) -> Callable[..., None]:
        """Asks vLLM's own routes; its backend is set up."""
        client = httpx.Client(base_url=self.server.url, timeout=SECONDS)

        def post(path: str, body: object = None, **query: str) -> None:
            client.post(path, json=body, params=query).raise_for_status()

        post("/init_weight_transfer_engine", {"init_info": {}})
        return post

    def reports(self) -> dict[str, Any]:
        """What the engine's worker tells of its last update, if it is ours."""
        return {"engine": str(self.server.rpc("checkpoint_engine_status")[0])}

    def ipc(self, packed: dict[str, int]) -> Callable[[int], None]:
        """A step by vLLM's own trainer."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine  # noqa: PLC0415

        post = self.post

        def step(_: int) -> None:
            options = {"send_mode": "http", "url": self.server.url, "packed": True, **packed}
            self.lap("pause", lambda: post("/pause", mode="keep"))
            self.lap("start", lambda: post("/start_weight_update"))
            self.lap("send", lambda: IPCWeightTransferEngine.trainer_send_weights(iter(self.weights.items()), options))
            self.lap("finish", lambda: post("/finish_weight_update"))
            self.lap("resume", lambda: post("/resume"))

        return step


def backend_of(system: str) -> tuple[str, dict[str, int]]:
    """The backend of vLLM's weight transfer, and settings of its `ipc` trainer; nothing where none is asked for."""
    kind, _, rest = system.partition("-")
    if kind != "ipc":
        return "checkpoint_engine" if kind == "native" else "", {}
    ours, size = "ours" in rest.split("-"), rest.rpartition("-")[2]
    packed = {"packed_buffer_size_bytes": int(size) << 30} if size.isdigit() else {}
    return "checkpoint_engine_ipc" if ours else "ipc", packed


def run(
    system: str, tensors: list[Tensor], arguments: argparse.Namespace, sums: dict[int, int]
) -> list[dict[str, Any]]:
    """The steps of one system, in an engine of its own; `sums` is what quantised engines held after each step."""
    model = arguments.work / arguments.workload
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(configuration(tensors)))
    make_tokenizer(model)
    options = ["--load-format", "dummy", "--max-model-len", "256", "--max-num-seqs", "2"]
    options += ["--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", str(1 << 30)]
    options += ["--tensor-parallel-size", str(arguments.tensor_parallel_size), *arguments.serve_options.split()]
    environment, (door, packed) = {}, backend_of(system)
    if door == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        os.environ.update(environment)
    if door:
        options += ["--weight-transfer-config", json.dumps({"backend": door})]
    rows: list[dict[str, Any]] = []
    with serving([model], arguments.work, *options, **environment) as (server,):
        weights = {t.name: torch.empty(t.shape, dtype=torch.bfloat16, device="cuda") for t in tensors}
        asked = {"client": server.client, "requests": server.timed.seconds, "traced": arguments.trace}
        asked |= {"workers": arguments.tensor_parallel_size, "native": system == "native"}
        trainer = VllmTrainer(weights=weights, server=server, **asked)
        step, tell = (trainer.ipc(packed), trainer.reports) if system.startswith("ipc") else trainer.ours(system)
        for number in range(arguments.steps):
            expected = trainer.change(number)
            begin = time.perf_counter()
            step(number)
            seconds = {**trainer.laps, "whole": time.perf_counter() - begin}
            held = sum(int(str(bits)) for bits in server.rpc("checkpoint_engine_bits"))
            right = held == (sums.setdefault(number, held) if "--quantization" in options else expected)
            free = int(str(server.rpc("checkpoint_engine_memory")[0]).strip("([").split(",")[0])
            rows.append({"system": system, "step": number, "seconds": seconds, "right": right, "free": free, **tell()})
            shown = {name: round(value, 4) for name, value in seconds.items()}
            told = {name: rows[-1].get(name, {}) for name in ("stages", "requests", "phases")}
            print(f"  {system:16} {number:3} {json.dumps(shown)} {json.dumps(told)}", flush=True)
            if not right:
                raise SystemExit(f"{system}: the engine holds something else than the trainer")
        print(f"  {system:16} {server.tokens()[0][:80]}", flush=True)
        trainer.lap("close", trainer.close)
        print(f"  {system:16} weights let go of in {trainer.laps['close']:.1f} s", flush=True)
    return rows


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["moe30b", "moe15b", "dense32b"])
    parser.add_argument("--systems", nargs="+", default=["device", "host", "ipc"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/checkpoint-engine-bench"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="workers, on a GPU each")
    parser.add_argument("--trace", action="store_true", help="say what was done when within each step")
    parser.add_argument("--serve-options", default="", help="more options of vllm serve, in one string")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    torch.cuda.set_device(0)
    tensors = WORKLOADS[arguments.workload]()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    record: dict[str, Any] = {
        "workload": arguments.workload,
        "engine": "vllm",
        "bytes": nbytes,
        "tensors": len(tensors),
        "gpus": arguments.tensor_parallel_size,
    }
    record |= {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}, "steps": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"rl-step-vllm-{arguments.workload}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    sums: dict[int, int] = {}
    for system in arguments.systems:
        record["steps"][system] = run(system, tensors, arguments, sums)
        path.write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(f"\n{arguments.workload}: {nbytes / 1e9:.1f} GB in {len(tensors)} tensors into vLLM, {record['device']}")
    for system, rows in record["steps"].items():
        whole = statistics.median(row["seconds"]["whole"] for row in rows[UNCOUNTED:] or rows)
        print(f"{system:16} whole {whole:7.3f} s   first {rows[0]['seconds']['whole']:7.3f} s")


if __name__ == "__main__":
    main()
