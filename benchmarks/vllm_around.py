"""Whether what surrounds an update is right with a real `vllm serve` on a GPU: some tensors only, checksums, adapters.

    python benchmarks/vllm_around.py [--work DIR]

Needs one GPU, vLLM (0.26 and newer) and both packages in this environment; takes about two minutes. Two servers of a
tiny dense model with CUDA graphs captured, one started from A and one from B, both with a LoRA adapter of files. What
both hold at first is what the first one must hold later: hashes of all parameters, greedy tokens with and without the
adapter. It takes B with checksums of every bucket, a layer of A alone, A whole, and the adapter out of memory under a
new name. Exits with 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file
from senders import Senders
from vllm_formats import MAKER, PLAIN
from vllm_server import PROMPTS, Server, serving

from checkpoint_engine import send_adapter

LAYER = "model.layers.1."
RANK = 8
PLUGINS = "checkpoint_engine"
"""Our routes: adapters come by no other door."""
ADAPTED = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
OPTIONS = ("--kv-cache-memory-bytes", str(1 << 28), "--max-model-len", "256", "--max-num-seqs", "4")
OPTIONS += (
    "--gpu-memory-utilization",
    "0.1",
    "--enable-lora",
    "--max-lora-rank",
    str(RANK),
    "--max-loras",
    "2",
    *PLAIN,
)


def make_adapter(checkpoint: Path, directory: Path) -> None:
    """A LoRA adapter of random numbers, large enough to change what is generated."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    weights = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(ADAPTED):
            for part, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
                made = torch.randn(shape, generator=generator) / 4
                tensors[f"base_model.model.{layer}.lora_{part}.weight"] = made.to(torch.bfloat16)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ADAPTED, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def generated(server: Server, model: str) -> list[list[int]]:
    """Greedy tokens of the base (`bench`) or of an adapter."""
    found: list[list[int]] = []
    for prompt in PROMPTS:
        body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        reply = httpx.post(f"{server.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=120)
        reply.raise_for_status()
        found.append(reply.json()["choices"][0]["token_ids"])
    return found


def hashes(server: Server) -> dict[str, str]:
    """Of the parameters of each module."""
    found: dict[str, str] = dict(server.rpc("checkpoint_engine_checksum")[0])  # pyright: ignore[reportArgumentType]
    return found


def state(server: Server, adapter: str) -> dict[str, Any]:
    """All that the references must have in common with what was updated."""
    return {"held": hashes(server), "base": generated(server, "bench"), "adapted": generated(server, adapter)}


def part_of(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """What modules hold where one layer alone is of `new`."""
    mixed = {name: (new if LAYER in f"{name}." else old)[name] for name in old}
    if mixed in (old, new):
        raise RuntimeError(f"no module of {LAYER} differs, or all do")
    return mixed


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vllm-around")
    parser.add_argument("--port", type=int, default=8100)
    arguments = parser.parse_args()
    os.environ |= {"CHECKPOINT_ENGINE_CHECKSUM": "1"}
    subprocess.run([sys.executable, str(MAKER), str(arguments.work), "qwen3", "qwen3-b"], check=True, timeout=200)
    a, b, files = arguments.work / "qwen3", arguments.work / "qwen3-b", arguments.work / "adapter"
    make_adapter(a, files)
    wrong: list[str] = []

    def expect(what: str, found: object, expected: object) -> None:
        print(f"{what}: {'as it should' if found == expected else 'WRONG'}", flush=True)
        wrong.extend([what] * (found != expected))

    with (
        serving(
            [a, b],
            arguments.work,
            *OPTIONS,
            *PLAIN,
            "--lora-modules",
            f"files={files}",
            port=arguments.port,
            VLLM_PLUGINS=PLUGINS,
        ) as servers,
        Senders(1, port=arguments.port + 500) as senders,
    ):
        check(senders, servers, (a, b), files, expect)
    sys.exit(1 if wrong else 0)


def check(
    senders: Senders,
    servers: list[Server],
    checkpoints: tuple[Path, Path],
    files: Path,
    expect: Callable[[str, object, object], None],
) -> None:
    """Takes the first one through all of it, and says of each step whether it holds what it should."""
    updated = servers[0]
    a, b = checkpoints
    for path in checkpoints:
        senders.register(path, in_place=False)
    cold = {path: state(server, "files") for path, server in zip(checkpoints, servers, strict=True)}
    expect("A, B and their adapted answers differ", len({str(s[k]) for s in cold.values() for k in s}), 6)
    for way in ("broadcast:auto", "direct:auto", "broadcast:loader"):
        senders.update(updated.client, b.name, way)
        expect(f"B with checksums, {way}", state(updated, "files"), cold[b])
        senders.update(updated.client, a.name, way, only=[f"{LAYER}*"])
        expect(f"a layer of A in B, {way}", hashes(updated), part_of(cold[b]["held"], cold[a]["held"]))
        senders.update(updated.client, a.name, way)
        expect(f"A with checksums, {way}", state(updated, "files"), cold[a])
    config = json.loads((files / "adapter_config.json").read_text())
    tensors = {name: tensor.cuda() for name, tensor in load_file(files / "adapter_model.safetensors").items()}
    send_adapter(updated.client, "memory", tensors, config, version="1", timeout=60)
    expect("an adapter out of the GPU's memory", state(updated, "memory"), cold[a])
    senders.update(updated.client, b.name, "direct:auto")
    expect("it stays when its base is updated", state(updated, "memory"), cold[b])


if __name__ == "__main__":
    main()
