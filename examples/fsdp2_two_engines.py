"""A plain PyTorch loop with FSDP2 that publishes every step into several serving engines at once: a vLLM and an SGLang.

    VLLM_PLUGINS=checkpoint_engine vllm serve MODEL --port 8000 &
    SGLANG_PLUGINS=checkpoint_engine python -m sglang.launch_server --model-path MODEL --port 8001 &
    torchrun --nproc-per-node 2 examples/fsdp2_two_engines.py MODEL http://127.0.0.1:8000 http://127.0.0.1:8001

There are as many ranks as engines: each gives its shards to all of them, and asks one to take the step. The policy
learns a sentence; after every step each engine is asked for it. It runs on the CPU, over gloo. MODEL is a directory
with a small dense model that transformers knows. With `--tensor-parallel-size`, each engine has so many workers. Beside
torch and transformers it needs both clients, which need no engine: checkpoint-engine-vllm, checkpoint-engine-sglang.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_engine.client.auto import AutoClient
from checkpoint_engine.ps import ParameterServer

PROMPT, ANSWER = "The capital of France is", " Paris, as everybody knows."
TIMEOUT = 120.0


def asker(engine: AutoClient, rank: int, workers: int, version: str) -> Callable[[list[tuple[str, str]]], None]:
    """Has this rank's engine take an update: its workers are those that this rank feeds."""

    def ask(handles: list[tuple[str, str]]) -> None:
        mine = dict(handles[rank * workers : (rank + 1) * workers])
        engine.update_weights(mine, version=version, pause="keep", reset_caches=True, timeout=TIMEOUT)

    return ask


def answer_of(endpoint: str, tokens: int) -> str:
    """What an engine says; vLLM and SGLang are asked alike."""
    with httpx.Client(base_url=endpoint, timeout=TIMEOUT) as http:
        model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        order = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0.0}
        return http.post("/v1/completions", json=order).raise_for_status().json()["choices"][0]["text"]


def main() -> None:
    """Trains and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("engines", nargs="+", help="where they listen, one for each rank")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--save", type=Path, help="where the weights of the last step go, gathered after all")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size, workers = dist.get_rank(), dist.get_world_size(), options.tensor_parallel_size
    if size != len(options.engines):
        raise SystemExit(f"{size} ranks, and {len(options.engines)} engines: start as many ranks as engines")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lesson = torch.tensor([tokenizer(PROMPT + ANSWER)["input_ids"]])
    length = lesson.shape[1] - len(tokenizer(PROMPT)["input_ids"])
    engine = AutoClient(options.engines[rank])
    method = "auto" if workers == 1 else "direct"
    with ParameterServer(device="cpu", master_port=free_port()) as ps:
        for step in range(options.steps):
            loss = model(lesson, labels=lesson).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
            ask = asker(engine, rank, workers, f"step-{step}")
            ps.publish(weights, ask, version=f"step-{step}", method=method, workers=workers, in_place=False)
            if rank == 0:
                said = [answer_of(endpoint, length) for endpoint in options.engines]
                print(f"step {step}: loss {loss.item():.3f}, {said}", flush=True)
        if options.save:
            whole = {name: tensor.full_tensor().contiguous() for name, tensor in weights.items()}
            if rank == 0:
                save_file(whole, options.save, metadata={"format": "pt"})
    dist.destroy_process_group()


def free_port() -> int:
    """A port of rank 0 that is not torchrun's own, alike on all ranks."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        mine = [probe.getsockname()[1]]
    dist.broadcast_object_list(mine)
    return int(mine[0])


if __name__ == "__main__":
    main()
