"""Engines of several workers: all of them have the new weights, or nobody is told so."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine_sglang import SGLangClient
from tests.rolling import Sender
from tests.sglang.sglang_push import InTreeAnswer, in_tree, push, read
from tests.sglang.sglang_server import Server, Stream
from tests.sharded import ShardingTrainer

Update = Callable[..., "subprocess.CompletedProcess[str]"]
Serve = Callable[..., Server]
Weights = dict[str, dict[str, torch.Tensor]]

FAULTS = {"load": {"tensor": "model.layers.1.self_attn.o_proj.weight"}, "finish": {"process": True}}
"""By the phase in which they show."""
DUMMY = ("--load-format", "dummy", "--wait-for-initial-weights")


@pytest.fixture(scope="module")
def weights(checkpoints: Path) -> Weights:
    return {name: read(checkpoints / name) for name in ("qwen3", "qwen3-b", "moe", "moe-b")}


def check_that_it_is_closed_until_healed(server: Server, tensors: dict[str, torch.Tensor]) -> None:
    assert server.status()["dirty"] is True
    assert server.http.get("/health").status_code == 503
    assert server.http.post("/generate", json={"text": "x"}).status_code == 503
    push(server, tensors, "healed")
    server.wait("/health")
    assert {worker["version"] for worker in server.status()["workers"]} == {"healed"}


def test_two_tensor_parallel_workers(
    serve: Serve, update_command: Update, checkpoints: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = serve("qwen3", "--tp-size", "2", workers=2)
    expected = fresh.state()
    fresh.close()
    server = serve("qwen3", "--tp-size", "2", *DUMMY, workers=2, until="/checkpoint_engine/status")
    assert [worker["rank"] for worker in server.status()["workers"]] == [0, 1]
    done = update_command(checkpoints / "qwen3-b", server, "--engine", "auto")
    assert done.returncode == 0, done.stderr
    server.wait("/health")
    assert server.checksums() != expected["checksums"]
    push(server, weights["qwen3"], "qwen3")
    assert server.state() == expected
    for name, how in (("qwen3-b", ("--reload", "plan")), ("qwen3", ("--method", "direct", "--reload", "plan"))):
        done = update_command(checkpoints / name, server, "--engine", "sglang", *how)
        assert done.returncode == 0, done.stderr
    assert server.state() == expected

    # A trainer's two ranks, each with its shards.
    trainer = ShardingTrainer(2, SGLangClient(server.endpoint))
    for dealing, method, name in (
        ("rows", "broadcast", "qwen3-b"),
        ("rows", "direct", "qwen3"),
        ("columns", "broadcast", "qwen3-b"),
        ("columns", "direct", "qwen3"),
        ("uneven", "broadcast", "qwen3-b"),
        ("uneven", "direct", "qwen3"),
    ):
        trainer.step(weights[name], dealing, method, name)
        assert (server.state() == expected) == (name == "qwen3")
    trainer.close()

    # The wrong number of workers.
    done = update_command(checkpoints / "qwen3-b", server, "--engine", "sglang", "--tensor-parallel-size", "1")
    assert done.returncode != 0
    assert "--tensor-parallel-size 2" in done.stderr

    # One worker's handle is left out.
    answer = InTreeAnswer()
    with pytest.raises(CheckpointEngineError):
        push(server, weights["qwen3-b"], ask=lambda handles: in_tree(server, answer)({"cpu:0": handles["cpu:0"]}))
    assert answer.status == 400
    assert "this engine has 2" in answer.message
    assert server.state() == expected

    # One worker cannot reach its parameter server.
    lost = {"cpu:1": "unix:///nowhere/at/all#token"}
    with pytest.raises(CheckpointEngineError):
        push(server, weights["qwen3-b"], ask=lambda handles: in_tree(server, answer)({**handles, **lost}), timeout=20)
    assert answer.status == 400
    assert "worker 1 failed in update" in answer.message
    assert server.state() == expected

    # One worker's loader fails in the middle; then only one worker's processing does, after the other is done.
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", "0.00001")
    for fault in FAULTS.values():
        for path in ("our client", "SGLang's own request"):
            answer = InTreeAnswer()
            server.fault(ranks=[1], **fault)
            ask = None if path == "our client" else in_tree(server, answer)
            with pytest.raises(CheckpointEngineError, match="a fault made by the test"):
                push(server, weights["qwen3-b"], "qwen3-b", ask=ask, reload="loader")
            server.fault()
            assert answer.status == (400 if ask else 0)
            check_that_it_is_closed_until_healed(server, weights["qwen3"])
    assert server.state() == expected

    # The same, and ranks that hold what the engine held before.
    with Sender(SGLangClient(server.endpoint), 2) as sender:
        for name in ("qwen3", "qwen3-b"):
            sender.hold(checkpoints / name)
        for method in ("broadcast", "direct"):
            sender.update("qwen3", method)
            for phase, fault in (
                ("load", {"tensor": "model.layers.1.self_attn.o_proj.weight"}),
                ("finish", {"process": True}),
            ):
                server.fault(ranks=[1], once=True, **fault)
                sender.fails_and_goes_back("qwen3-b", "qwen3", method, phase)
                assert server.state() == expected
                assert (server.status()["dirty"], server.weight_version()) == (False, "qwen3")


def test_experts_that_are_spread_over_two_workers(
    serve: Serve, update_command: Update, checkpoints: Path, weights: Weights
) -> None:
    """Only weights are compared: SGLang on the CPU starts so, but ends at the first request."""
    spread = ("--tp-size", "2", "--ep-size", "2", "--skip-server-warmup")
    fresh = serve("moe-b", *spread, workers=2, until="/checkpoint_engine/status")
    expected = fresh.checksums()
    fresh.close()
    server = serve("moe", *spread, workers=2, until="/checkpoint_engine/status")
    before = server.checksums()
    for name, *how in (("moe-b",), ("moe", "--reload", "plan"), ("moe-b", "--method", "direct", "--reload", "plan")):
        done = update_command(checkpoints / name, server, "--engine", "sglang", *how)
        assert done.returncode == 0, done.stderr
        assert server.checksums() == (expected if name == "moe-b" else before) != {}
    assert before != expected

    # A trainer's two ranks, each with its experts.
    trainer = ShardingTrainer(2, SGLangClient(server.endpoint))
    for method, name in (("broadcast", "moe"), ("direct", "moe-b")):
        trainer.step(weights[name], "experts", method, name)
        assert server.checksums() == (expected if name == "moe-b" else before)
    trainer.close()


def test_two_pipeline_stages(serve: Serve, update_command: Update, checkpoints: Path, weights: Weights) -> None:
    fresh = serve("qwen3-b", "--pp-size", "2", workers=2)
    expected = fresh.tokens()
    fresh.close()
    server = serve("qwen3", "--pp-size", "2", *DUMMY, workers=2, until="/checkpoint_engine/status")
    assert server.http.get("/health").status_code == 503
    done = update_command(checkpoints / "qwen3-b", server, "--engine", "sglang")
    assert done.returncode == 0, done.stderr
    server.wait("/health")
    first = server.tokens()
    assert first == expected
    push(server, weights["qwen3"], "qwen3")
    assert server.tokens() != first

    # A request under way is waited for: SGLang cannot stop stages between two steps.
    server.fault(slow=0.02)
    stream = Stream(server, 30)
    stream.wait_for(5)
    for _ in range(3):  # with a batch in every stage
        assert [worker["version"] for worker in server.status()["workers"]] == ["qwen3"] * 2
    push(server, weights["qwen3-b"], "qwen3-b")
    stream.join()
    server.fault()
    assert len(stream.tokens) == 30
    assert server.tokens() == first

    broken = {name: tensor for name, tensor in weights["qwen3-b"].items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointEngineError, match=r"lm_head\.weight"):
        push(server, broken, "qwen3-b")
    with pytest.raises(CheckpointEngineError, match=r"nonsense\.weight"):
        push(server, {**weights["qwen3-b"], "nonsense.weight": torch.ones(3)}, "qwen3-b")
    server.wait("/health", seconds=10)
    answer = InTreeAnswer()
    push(server, weights["qwen3"], "qwen3", ask=in_tree(server, answer, weight_version="qwen3"))
    assert answer.status == 200
    assert server.tokens() != first
    assert server.weight_version() == "qwen3"
    assert {worker["version"] for worker in server.status()["workers"]} == {"qwen3"}


def test_two_replicas_of_a_mixture_of_experts(
    serve: Serve, update_command: Update, checkpoints: Path, weights: Weights
) -> None:
    fresh = serve("moe")
    expected = fresh.state()
    fresh.close()
    server = serve("moe", "--dp-size", "2", *DUMMY, workers=2, until="/checkpoint_engine/status")
    push(server, weights["moe-b"], "moe-b")
    server.wait("/health")
    before = server.checksums()
    push(server, weights["moe"], "moe")
    assert server.checksums() == expected["checksums"] * len(before)
    # Requests go to one replica and to the other.
    assert [server.tokens() for _ in range(2)] == [expected["tokens"]] * 2
    assert before != server.checksums()
    for name in ("moe-b", "moe"):
        done = update_command(checkpoints / name, server, "--engine", "sglang", "--method", "direct")
        assert done.returncode == 0, done.stderr
    assert server.checksums() == expected["checksums"] * len(before)
    answer = InTreeAnswer()
    push(server, weights["moe-b"], "moe-b", ask=in_tree(server, answer))
    assert answer.status == 200
    assert server.checksums() == before
    incomplete: dict[str, Any] = dict(weights["moe"])
    del incomplete["model.layers.1.mlp.experts.7.down_proj.weight"]
    with pytest.raises(CheckpointEngineError, match=r"model\.layers\.1\.mlp\.experts\.w2_weight"):
        push(server, incomplete, "moe")
    assert server.checksums() == before
