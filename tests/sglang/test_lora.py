"""LoRA adapters of a serving SGLang with two workers: replaced out of memory, and kept below a new base."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine.server.adapters import send_adapter
from checkpoint_engine_sglang import SGLangClient
from tests.sglang.sglang_server import PROMPTS, SHARED_MEMORY, Server, Stream

pytestmark = pytest.mark.endurance

Serve = Callable[..., Server]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

RANK = 4
LAYERS = ("q_proj", "v_proj", "o_proj", "down_proj")
OPTIONS = (
    *("--tp-size", "2", "--enable-lora", "--max-lora-rank", str(RANK), "--lora-target-modules", *LAYERS),
    *("--lora-backend", "torch_native", "--max-loras-per-batch", "4"),
)


def make_adapter(checkpoint: Path, directory: Path, seed: int) -> None:
    """Of random numbers, that change what is generated."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            layer = name.removesuffix(".weight")
            if layer.endswith(LAYERS):
                for part, shape in (("A", (RANK, tensor.shape[1])), ("B", (tensor.shape[0], RANK))):
                    made = torch.randn(shape, generator=generator) / 4
                    tensors[f"base_model.model.{layer}.lora_{part}.weight"] = made.to(torch.bfloat16)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": LAYERS, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def send(server: Server, directory: Path, name: str = "math", **config: Any) -> None:
    told = json.loads((directory / "adapter_config.json").read_text()) | config
    tensors = load_file(directory / "adapter_model.safetensors")
    send_adapter(SGLangClient(server.endpoint), name, tensors, told, version=directory.name, timeout=120)


def generated(server: Server, adapter: str | None, length: int = 12) -> list[list[int]]:
    parameters = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
    found = []
    for prompt in PROMPTS:
        body = {"text": prompt, "sampling_params": parameters, "lora_path": adapter}
        reply = server.http.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        found.append(reply.json()["output_ids"])
    return found


def kept_directories() -> list[Path]:
    return [each for home in SHARED_MEMORY.glob("checkpoint-engine-adapters-*") for each in home.glob("*/")]


def start(serve: Serve, model: str, *adapters: Path) -> Server:
    server = serve(model, *OPTIONS, workers=2, extra_plugins="unpinned")
    for directory in adapters:
        body = {"lora_name": directory.name, "lora_path": str(directory)}
        assert server.http.post("/load_lora_adapter", json=body).json()["success"]
    return server


def state(server: Server) -> dict[str, Any]:
    """Tokens with and without each adapter, and the bits of all that the model holds."""
    return {"checksums": server.checksums(), **{str(name): generated(server, name) for name in (None, "one", "two")}}


def test_adapters_are_replaced_by_all_workers_or_none_and_outlast_their_base(
    serve: Serve, update_command: Command, verify_command: Command, checkpoints: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for seed, directory in enumerate((one, two)):
        make_adapter(checkpoints / "qwen3", directory, seed)
    fresh = start(serve, "qwen3-b", one, two)
    states = {"qwen3-b": state(fresh)}
    fresh.close()
    server = start(serve, "qwen3", one, two)
    states["qwen3"] = state(server)
    cold = {name: states["qwen3"][str(name)] for name in (None, "one", "two")}
    assert len({str(tokens) for each in states.values() for tokens in each.values()}) == 8

    for directory in (one, two, one):
        send(server, directory)
        assert generated(server, "math") == cold[directory.name]
        assert server.status()["adapters"] == {"math": directory.name}

    # One of two workers cannot take it, or both cannot.
    server.fault(adapter=True, ranks=[1])
    with pytest.raises(EngineRequestError, match=r"worker 1 failed.*a fault made by the test"):
        send(server, two)
    server.fault()
    with pytest.raises(EngineRequestError, match="max-lora-rank"):
        send(server, two, r=2 * RANK)
    assert generated(server, "math") == cold["one"]
    assert server.status()["adapters"] == {"math": "one"}

    # What runs ends with the adapter that it began with; what comes gets the new one.
    server.fault(slow=0.05)
    running = Stream(server, 100, lora_path="math")
    running.wait_for(3)
    send(server, two)
    assert running.finish is None
    server.fault()
    assert generated(server, "math", 3) == [tokens[:3] for tokens in cold["two"]]
    running.join()
    assert running.tokens[:12] == cold["one"][0]
    end = time.monotonic() + 20
    while len(kept_directories()) > 1:
        assert time.monotonic() < end, "the old ones are not unloaded"
        time.sleep(0.2)

    # A new base below them: by the loader with proof, by plan that is compared, by plan; directly; by the loader alone.
    incomplete = update_command(checkpoints / "qwen3-b", server, "--engine", "sglang", "--ignore", "*.q_proj.weight")
    assert (incomplete.returncode, "does not fill" in incomplete.stderr) == (1, True), incomplete.stderr
    assert state(server) == states["qwen3"]
    ways = ((), (), ("--reload", "plan"), ("--method", "direct"), ("--reload", "loader"))
    for name, how in zip(("qwen3-b", "qwen3", "qwen3-b", "qwen3", "qwen3-b"), ways, strict=True):
        done = update_command(checkpoints / name, server, "--engine", "sglang", *how)
        assert done.returncode == 0, done.stderr
        assert state(server) == states[name]
    assert generated(server, "math") == states["qwen3-b"]["two"]
    for name, code in (("qwen3-b", 0), ("qwen3", 1)):
        assert verify_command(checkpoints / name, server, "--engine", "sglang").returncode == code
    assert state(server) == states["qwen3-b"]
