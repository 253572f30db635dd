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


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("qwen3", ("--pipeline-parallel-size", "2")),
        ("moe", ("--tensor-parallel-size", "2", "--enable-expert-parallel")),
    ],
    ids=["stages", "experts"],
)
def test_weights_that_are_spread_otherwise(
    serve: Serve, update: Update, verify: Update, checkpoints: Path, kind: str, option: tuple[str, ...]
) -> None:
    """Only weights are compared: vLLM's build for the CPU starts so, but answers no request."""
    two_workers = ("--tensor-parallel-size", "2")
    a, b = checkpoints / kind, checkpoints / f"{kind}-b"
    server = serve(a, *option, VLLM_CPU_OMP_THREADS_BIND="0|1")
    for path, *way in ((b,), (a,), (b, "--method", "direct"), (a,)):
        done = update(path, server, *two_workers, *way)
        assert done.returncode == 0, done.stderr
        assert verify(path, server, *two_workers).returncode == 0
    assert [worker["last_update"]["reload"] for worker in server.rpc("checkpoint_engine_status")] == ["plan", "plan"]
    assert verify(b, server, *two_workers).returncode == 1
    server.close()
