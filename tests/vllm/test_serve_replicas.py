"""Two data-parallel replicas behind one server: both take each update, and what one of them fails at is told."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cores import cores
from tests.vllm.test_serve import Stream

pytestmark = pytest.mark.endurance

STATUS = "/v1/checkpoint_engine/status"
KEY = {"CHECKPOINT_ENGINE_API_KEY": "secret"}
BOTH = ("--tensor-parallel-size", "2")
TINY_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "0.00001"}
Serve = Callable[..., Any]
Update = Callable[..., "subprocess.CompletedProcess[str]"]


def tokens_of_each(server: Any) -> list[list[list[int]]]:
    """Replica by replica: vLLM sends a request to the one that its header names."""
    found = []
    for replica in ("0", "1"):
        server.http.headers["X-data-parallel-rank"] = replica
        found.append(server.tokens())
    return found


def held(server: Any) -> list[tuple[str, bool]]:
    return [(worker["version"], worker["dirty"]) for worker in server.get(STATUS)["workers"]]


def test_every_replica_is_updated_checked_and_healed(
    serve: Serve, update: Update, verify: Update, checkpoints: Path
) -> None:
    """A dense model's: each replica is told by vLLM that it is alone."""
    a, b = "qwen3", "qwen3-b"
    server = serve(
        a,
        *("--data-parallel-size", "2", "--worker-extension-cls", "faulty_extension.FaultyExtension"),
        PYTHONPATH=str(Path(__file__).parent),
        VLLM_PLUGINS="checkpoint_engine",
        VLLM_API_KEY="secret",
        VLLM_CPU_OMP_THREADS_BIND=cores(2),
    )
    cold = tokens_of_each(server)
    assert cold[0] == cold[1]
    for name, *how in ((b,), (a, "--method", "direct")):
        done = update(checkpoints / name, server, *BOTH, *how, **KEY, **TINY_BUCKETS)
        assert done.returncode == 0, done.stderr
        assert held(server) == [(name, False)] * 2
        assert [worker["replica"] for worker in server.get(STATUS)["workers"]] == [0, 1]
        tokens = tokens_of_each(server)
        assert tokens[0] == tokens[1]
        assert (tokens == cold) is (name == a)
        assert server.get(STATUS)["weight_version"] == name
    wrong = update(checkpoints / b, server, **KEY)
    assert (wrong.returncode, "--tensor-parallel-size 2" in wrong.stderr) == (1, True), wrong.stderr

    # The second replica fails, of which vLLM's development routes say nothing.
    server.rpc("checkpoint_engine_test_break", 12, True, None, 1)
    failed = update(checkpoints / b, server, *BOTH, "--reload", "loader", **KEY, **TINY_BUCKETS)
    assert failed.returncode == 1
    assert "rank 1" in failed.stderr
    assert "a fault made by the test" in failed.stderr
    status = server.get(STATUS)
    assert status["paused"]
    assert [worker["error"].startswith("SenderAborted") for worker in status["workers"]] == [True, False]
    assert "a fault made by the test" in status["workers"][1]["error"]
    assert verify(checkpoints / a, server, *BOTH, **KEY).returncode == 1
    healed = update(checkpoints / b, server, *BOTH, **KEY)
    assert healed.returncode == 0, healed.stderr
    assert held(server) == [(b, False)] * 2

    assert verify(checkpoints / b, server, *BOTH, **KEY).returncode == 0
    server.rpc("checkpoint_engine_test_spoil", 1)
    differs = verify(checkpoints / b, server, *BOTH, **KEY)
    assert differs.returncode == 1, differs.stdout
    assert ["rank 0, different" in differs.stdout, "rank 1, different" in differs.stdout] == [False, True]
    server.close()


def test_replicas_of_experts_are_paused_to_be_updated_and_to_be_compared(
    serve: Serve, update: Update, verify: Update, checkpoints: Path
) -> None:
    """They take each step together, also while only one of them has a request."""
    a, b = "moe", "moe-b"
    server = serve(
        a,
        *("--data-parallel-size", "2", "--worker-extension-cls", "gathering.GatheringExtension"),
        PYTHONPATH=str(Path(__file__).parent),
        VLLM_PLUGINS="checkpoint_engine",
        VLLM_CPU_OMP_THREADS_BIND=cores(2),
    )
    assert [(worker["replicas"], worker["in_step"]) for worker in server.get(STATUS)["workers"]] == [(2, 2)] * 2
    cold = tokens_of_each(server)
    assert cold[0] == cold[1]
    server.rpc("checkpoint_engine_test_slow", 0.05)
    running = Stream(server.endpoint, 3000)
    running.wait_for(3)
    refused = update(checkpoints / b, server, *BOTH, "--pause", "none", "--keep-caches")
    assert (refused.returncode, "take each step together" in refused.stderr) == (1, True), refused.stderr
    assert verify(checkpoints / a, server, *BOTH).returncode == 0
    under_way = list[bool]()
    for name, *how in ((b,), (a, "--method", "direct"), (b,)):
        done = update(checkpoints / name, server, *BOTH, *how, **TINY_BUCKETS)
        assert done.returncode == 0, done.stderr
        under_way.append(len(running.tokens) < 3000)
    assert under_way[0]
    server.rpc("checkpoint_engine_test_slow", 0)
    running.join()
    assert len(running.tokens) == 3000
    assert verify(checkpoints / b, server, *BOTH).returncode == 0
    for name in (b, a):
        done = update(checkpoints / name, server, *BOTH)
        assert done.returncode == 0, done.stderr
        tokens = tokens_of_each(server)
        assert tokens[0] == tokens[1]
        assert (tokens == cold) is (name == a)
    server.close()


def test_two_servers_are_updated_together(serve: Serve, update: Update, verify: Update, checkpoints: Path) -> None:
    """As behind a balancer of somebody else's; a server that fails is told by its rank, and both are healed."""
    a, b = "qwen3", "qwen3-b"
    faulty = ("--worker-extension-cls", "faulty_extension.FaultyExtension")
    first, second = (serve(a, *faulty, PYTHONPATH=str(Path(__file__).parent)) for _ in range(2))
    other = ("--endpoint", second.endpoint)
    cold = first.tokens()
    assert second.tokens() == cold
    for name, *how in ((b,), (a, "--method", "direct", "--ranks", "1")):
        done = update(checkpoints / name, first, *other, *how, **TINY_BUCKETS)
        assert done.returncode == 0, done.stderr
        assert first.tokens() == second.tokens()
        assert (first.tokens() == cold) is (name == a)
        assert [each.get("/weight_info") for each in (first, second)] == [{"weight_version": name}] * 2
    second.rpc("checkpoint_engine_test_break", 12, True)
    failed = update(checkpoints / b, first, *other, "--reload", "loader", **TINY_BUCKETS)
    assert (failed.returncode, "rank 1" in failed.stderr) == (1, True), failed.stderr
    assert second.endpoint in failed.stderr
    healed = update(checkpoints / b, first, *other)
    assert healed.returncode == 0, healed.stderr
    assert verify(checkpoints / b, first, *other).returncode == 0
    second.rpc("checkpoint_engine_test_spoil", 0)
    assert verify(checkpoints / b, first, *other).returncode == 1
    first.close()
    second.close()
