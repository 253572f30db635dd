"""LoRA with two tensor-parallel workers: adapters stay when their base is updated, and are replaced out of memory."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine.server.adapters import send_adapter
from checkpoint_engine_vllm import VllmClient
from tests.cores import cores
from tests.vllm.conftest import PROMPTS, completion

pytestmark = pytest.mark.endurance

Serve = Callable[..., Any]
Update = Callable[..., "subprocess.CompletedProcess[str]"]

BOTH = ("--tensor-parallel-size", "2")
WITH_ADAPTERS = (*BOTH, "--enable-lora", "--max-lora-rank", "8", "--max-loras", "1", "--max-cpu-loras", "1")
KEY = {"CHECKPOINT_ENGINE_API_KEY": "secret"}


def generated(server: Any, model: str) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        reply = server.http.post("/v1/completions", json=completion(prompt, 16) | {"model": model})
        assert reply.status_code == 200, reply.text
        found.append(reply.json()["choices"][0]["token_ids"])
    return found


@pytest.fixture
def adapters(engine: Any, checkpoints: Path, tmp_path: Path) -> dict[str, Path]:
    """Two, of other numbers."""
    made = {name: tmp_path / name for name in ("first", "second")}
    for seed, directory in enumerate(made.values()):
        engine("make_adapter", checkpoint=checkpoints / "qwen3", directory=directory, seed=seed)
    return made


def send(server: Any, directory: Path, name: str = "math", **config: Any) -> None:
    told = json.loads((directory / "adapter_config.json").read_text()) | config
    tensors = load_file(directory / "adapter_model.safetensors")
    send_adapter(VllmClient(server.endpoint, timeout=60), name, tensors, told, version=directory.name, timeout=120)


def test_adapters_of_two_workers(
    serve: Serve,
    update: Update,
    verify: Update,
    adapters: dict[str, Path],
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each server is the other's reference: one starts from A, one from B, each with both adapters of files."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_API_KEY", "secret")
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": cores(2),
        "VLLM_PLUGINS": "checkpoint_engine",
        "VLLM_API_KEY": "secret",
        "VLLM_SERVER_DEV_MODE": "0",
    }
    of_files = [f"{name}={directory}" for name, directory in adapters.items()]
    expected = {}
    for name in ("qwen3-b", "qwen3"):
        server = serve(name, *WITH_ADAPTERS, "--lora-modules", *of_files, **environment)
        expected[name] = {model: generated(server, model) for model in ("tiny", *adapters)}
        if name == "qwen3-b":
            server.close()
    assert len({str(tokens) for each in expected.values() for tokens in each.values()}) == 6
    a, b = expected["qwen3"], expected["qwen3-b"]

    # A name that was not there, and then another adapter under it; one slot: each displaces what was asked for last.
    for directory in (adapters["first"], adapters["second"], adapters["first"]):
        send(server, directory)
        assert generated(server, "math") == a[directory.name]
        assert generated(server, "second") == a["second"]
        assert generated(server, "math") == a[directory.name]
        assert server.get("/v1/checkpoint_engine/status")["adapters"] == {"math": directory.name}
    with pytest.raises(EngineRequestError, match="max_lora_rank") as refused:
        send(server, adapters["second"], r=64)
    assert "it serves them" in str(refused.value)
    assert generated(server, "math") == a["first"]
    with pytest.raises(EngineRequestError, match="no name for an adapter"):
        send(server, adapters["second"], name="tiny")

    # A name of files goes on in memory.
    send(server, adapters["second"], name="first")
    assert generated(server, "first") == a["second"]

    shutil.rmtree(adapters["first"])
    for base, tokens in (("qwen3-b", b), ("qwen3", a), ("qwen3-b", b)):
        done = update(checkpoints / base, server, *BOTH, **KEY)
        assert done.returncode == 0, done.stderr
        assert verify(checkpoints / base, server, *BOTH, **KEY).returncode == 0
        assert {model: generated(server, model) for model in ("math", "tiny", "first")} == {
            "math": tokens["first"],
            "tiny": tokens["tiny"],
            "first": tokens["second"],
        }
    send(server, adapters["second"])
    assert generated(server, "math") == b["second"]
    server.close()
