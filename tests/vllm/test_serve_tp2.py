"""Two workers. Each server is the other's reference: one starts cold from A, one from B."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Serve = Callable[..., Any]
Update = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_two_workers_from_a_to_b_and_back(serve: Serve, update: Update, checkpoints: Path, kind: str) -> None:
    a, b = kind, f"{kind}-b"
    two_workers = ("--tensor-parallel-size", "2")
    # vLLM binds the workers to cores; `auto` wants a NUMA node for each.
    first = serve(a, *two_workers, VLLM_CPU_OMP_THREADS_BIND="0|1")
    tokens = {a: first.tokens()}
    assert update(checkpoints / b, first, *two_workers, PS_MAX_BUCKET_SIZE_GB="0.00001").returncode == 0
    after_update = first.tokens()
    assert update(checkpoints / a, first, *two_workers).returncode == 0
    assert first.tokens() == tokens[a]
    status = first.rpc("checkpoint_engine_status")
    assert [worker["version"] for worker in status] == [a, a]
    assert [worker["last_update"]["reload"] for worker in status] == ["plan", "plan"]
    for name, expected, ranks in ((b, after_update, 2), (a, tokens[a], 1)):
        direct = ("--method", "direct", "--ranks", str(ranks), "--json")
        done = update(checkpoints / name, first, *two_workers, *direct)
        assert done.returncode == 0
        said = json.loads(done.stdout)
        assert (said["method"], [worker["reload"] for worker in said["engine"]]) == ("direct", ["plan"] * ranks)
        assert first.tokens() == expected
    refused = update(checkpoints / b, first, "--tensor-parallel-size", "1")
    assert refused.returncode != 0
    assert "--tensor-parallel-size 2" in refused.stderr
    assert first.tokens() == tokens[a]
    first.close()

    second = serve(b, *two_workers, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert second.tokens() == after_update != tokens[a]
    second.close()


def test_experts_that_are_spread_over_two_workers(
    serve: Serve, update: Update, verify: Update, checkpoints: Path
) -> None:
    two_workers = ("--tensor-parallel-size", "2")
    spread = (*two_workers, "--enable-expert-parallel")
    first = serve("moe", *spread, VLLM_CPU_OMP_THREADS_BIND="0|1")
    of_a = first.tokens()
    for name, ways in (("moe-b", []), ("moe", []), ("moe-b", []), ("moe", ["--method", "direct"]), ("moe-b", [])):
        done = update(checkpoints / name, first, *two_workers, *ways)
        assert done.returncode == 0, done.stderr
    assert [worker["last_update"]["reload"] for worker in first.rpc("checkpoint_engine_status")] == ["plan", "plan"]
    assert verify(checkpoints / "moe-b", first, *two_workers).returncode == 0
    assert verify(checkpoints / "moe", first, *two_workers).returncode == 1
    updated = first.tokens()
    first.close()

    second = serve("moe-b", *spread, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert second.tokens() == updated != of_a
    second.close()


def test_two_pipeline_stages(serve: Serve, update: Update, verify: Update, checkpoints: Path) -> None:
    """vLLM's build for the CPU answers no request in stages, so only the weights are compared."""
    two_workers = ("--tensor-parallel-size", "2")
    server = serve("qwen3", "--pipeline-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    for name, ways in (("qwen3-b", []), ("qwen3", []), ("qwen3-b", ["--method", "direct"]), ("qwen3", [])):
        done = update(checkpoints / name, server, *two_workers, *ways)
        assert done.returncode == 0, done.stderr
        assert verify(checkpoints / name, server, *two_workers).returncode == 0
    assert [worker["last_update"]["reload"] for worker in server.rpc("checkpoint_engine_status")] == ["plan", "plan"]
    assert verify(checkpoints / "qwen3-b", server, *two_workers).returncode == 1
    server.close()
