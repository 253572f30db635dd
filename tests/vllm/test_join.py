"""Real vLLM joins: by the command while it serves, and by itself when it starts. Seeds are ranks on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosts import Network, why_not
from seeding import ENVIRONMENT as HOSTS_ENVIRONMENT
from seeding import seeds

from conftest import free_port, vllm_environment

COMMAND = str(Path(sys.executable).parent / "checkpoint-engine")
TOKEN = "a-token-of-sixteen-or-more"
ENVIRONMENT = {
    "PS_MAX_BUCKET_SIZE_GB": "0.0001",
    "CHECKPOINT_ENGINE_P2P_HOST": "127.0.0.1",
    "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
    "CHECKPOINT_ENGINE_TOKEN": TOKEN,
}


@pytest.fixture(scope="module")
def seed(checkpoints: Path) -> Iterator[str]:
    """Address of a parameter server that holds `qwen3` and shares its memory."""
    port = free_port()
    process = subprocess.Popen(
        [COMMAND, "serve", "--device", "cpu", "--allow-root", str(checkpoints), "--port", str(port), "--share"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
            files = [str(file) for file in sorted((checkpoints / "qwen3").glob("*.safetensors"))]
            client.post("/v1/checkpoints/qwen3/files", json={"files": files}).raise_for_status()
            client.post("/v1/checkpoints/qwen3/gather-metas").raise_for_status()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_serving_engine_joins_from_two_hosts_of_two_ranks(
    serve: Callable[..., Any], cold: Callable[..., dict[str, Any]], checkpoints: Path, tmp_path: Path
) -> None:
    """The engine's rank is on a third host; nothing but its own link reaches the engine from there."""
    expected = cold("qwen3")["tokens"]
    server = serve("qwen3", "--load-format", "dummy", socket_path=tmp_path / "vllm.sock")
    assert server.tokens() != expected
    command = [COMMAND, "join", "--metas", str(tmp_path / "metas.json"), "--engine", "vllm", "--json"]
    with Network(3) as network, seeds(network, checkpoints / "qwen3", tmp_path / "metas.json"):
        done = subprocess.run(
            network.command(2, [*command, "--endpoint", server.endpoint, "--device", "cpu"]),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | HOSTS_ENVIRONMENT | {"PS_MAX_BUCKET_SIZE_GB": "0.0001"},
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "p2p"
    assert server.tokens() == expected
    server.close()


def test_an_engine_starts_from_running_ones(
    seed: str, serve: Callable[..., Any], cold: Callable[..., dict[str, Any]], checkpoints: Path, tmp_path: Path
) -> None:
    """It has a configuration and a tokenizer, and no weights of its own."""
    model = tmp_path / "no-weights"
    shutil.copytree(checkpoints / "qwen3", model, ignore=shutil.ignore_patterns("*.safetensors*"))
    extra = json.dumps({"metas": seed})
    server = serve(model, "--load-format", "checkpoint_engine", "--model-loader-extra-config", extra, **ENVIRONMENT)
    assert server.tokens() == cold("qwen3")["tokens"]
    server.close()


def test_an_engine_that_finds_no_seed_says_so_at_once(vllm_bin: Path, checkpoints: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [vllm_bin / "vllm", "serve", checkpoints / "qwen3", "--load-format", "checkpoint_engine"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=vllm_environment(CHECKPOINT_ENGINE_METAS=nowhere),
    )
    assert done.returncode != 0
    assert f"{nowhere} cannot be reached" in done.stderr
