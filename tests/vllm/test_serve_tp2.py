"""Two workers. Each server is the other's reference: one starts cold from A, one from B."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine_vllm import VllmClient
from tests.core.test_shards import tensors_of
from tests.cores import cores
from tests.ports import free_port
from tests.rolling import Sender
from tests.sharded import ShardingTrainer

DEALINGS = {"qwen3": ("rows", "columns", "uneven"), "moe": ("experts",)}
"""How a trainer's two ranks have cut the weights."""
BOTH = ("--tensor-parallel-size", "2")
# vLLM binds the workers to cores; `auto` wants a NUMA node for each.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": cores(2)}
Serve = Callable[..., Any]
Update = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_two_workers_from_a_to_b_and_back(
    serve: Serve, update: Update, verify: Update, trainers: list[Any], checkpoints: Path, kind: str
) -> None:
    a, b = kind, f"{kind}-b"
    two_workers = BOTH
    faulty = ("--worker-extension-cls", "faulty_extension.FaultyExtension")
    where = {**CORES, "PYTHONPATH": str(Path(__file__).parent)}
    first = serve(a, *two_workers, *faulty, *weight_transfer("checkpoint_engine"), **where)
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
    trainer = ShardingTrainer(2, VllmClient(first.endpoint))
    for dealing in DEALINGS[kind]:
        for method, name in (("broadcast", b), ("direct", a)):
            trainer.step(tensors_of(checkpoints / name), dealing, method, f"{name}, {dealing}")
            assert first.tokens() == (tokens[a] if name == a else after_update)
        assert verify(checkpoints / a, first, *two_workers).returncode == 0
    trainer.close()
    assert [worker["version"] for worker in first.rpc("checkpoint_engine_status")] == [f"{a}, {DEALINGS[kind][-1]}"] * 2
    refused = update(checkpoints / b, first, "--tensor-parallel-size", "1")
    assert refused.returncode != 0
    assert "--tensor-parallel-size 2" in refused.stderr
    assert first.tokens() == tokens[a]
    tokens[b] = after_update
    if kind == "moe":  # which has all kinds of layers that the other has
        one_worker_fails_and_both_get_back_what_they_had(first, checkpoints, a, b, tokens)
    vllms_trainer_side_publishes_through_us(first, trainers, checkpoints, {name: tokens[name] for name in (b, a)})
    first.close()

    second = serve(b, *two_workers, *weight_transfer("checkpoint_engine_nccl"), **CORES)
    assert second.tokens() == after_update != tokens[a]
    vllms_nccl_trainer_sends_as_ever(second, trainers[0], checkpoints, {name: tokens[name] for name in (a, b)})
    second.close()


def one_worker_fails_and_both_get_back_what_they_had(
    server: Any, checkpoints: Path, old: str, new: str, tokens: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PS_MAX_BUCKET_SIZE_GB", "0.00001")  # worker 1 has taken some of them when it fails
        with Sender(VllmClient(server.endpoint), 2) as sender:
            for name in (old, new):
                sender.hold(checkpoints / name)
            for method in ("broadcast", "direct"):
                sender.update(old, method)
                before = server.rpc("checkpoint_engine_test_fingerprint")
                server.rpc("checkpoint_engine_test_break", 12, True, 1)
                sender.fails_and_goes_back(new, old, method)
                assert server.tokens() == tokens[old]
                assert server.rpc("checkpoint_engine_test_fingerprint") == before
                workers = server.rpc("checkpoint_engine_status")
                assert [(worker["version"], worker["dirty"]) for worker in workers] == [(old, False)] * 2
                sender.update(new, method)
                assert server.tokens() == tokens[new]
            sender.update(old, "broadcast")


def weight_transfer(backend: str) -> tuple[str, str]:
    return "--weight-transfer-config", json.dumps({"backend": backend})


def vllms_trainer_side_publishes_through_us(
    server: Any, trainers: list[Any], checkpoints: Path, expected: dict[str, Any]
) -> None:
    """Two trainer ranks by broadcast, one that feeds both workers directly; tensors where they are, and made anew."""
    for ranks, method, in_place in ((trainers, "broadcast", False), (trainers[:1], "direct", True)):
        where = {"master_addr": "127.0.0.1", "master_port": free_port()}
        share = {"world_size": len(ranks), "workers": 2 // len(ranks), "method": method}
        for rank, trainer in enumerate(ranks):
            trainer.ask("meet", endpoint=server.endpoint, backend="checkpoint_engine", rank=rank, **share, **where)
        answered(ranks)
        for name, tokens in expected.items():
            for trainer in ranks:
                trainer.ask("send", checkpoint=checkpoints / name, in_place=in_place)
            answered(ranks)
            assert server.tokens() == tokens
            assert server.get("/weight_info") == {"weight_version": name}
            for worker in server.rpc("checkpoint_engine_status"):
                assert (worker["door"], worker["version"], worker["dirty"]) == ("checkpoint_engine", name, False)
                assert worker["last_update"]["reload"] == "plan"
        for trainer in ranks:
            trainer("part")


def vllms_nccl_trainer_sends_as_ever(server: Any, trainer: Any, checkpoints: Path, expected: dict[str, Any]) -> None:
    how = {"port": free_port(), "workers": 2, "buffer": 300_000}
    assert trainer("meet", endpoint=server.endpoint, backend="nccl", **how)["error"] is None
    ways: list[str] = []
    for name in (*expected, *expected):
        assert trainer("send", checkpoint=checkpoints / name, backend="nccl")["error"] is None
        assert server.tokens() == expected[name]
        workers = server.rpc("checkpoint_engine_status")
        assert {(worker["door"], worker["dirty"]) for worker in workers} == {("checkpoint_engine_nccl", False)}
        ways.append("/".join(worker["last_update"]["reload"] for worker in workers))
    assert ways == ["proof/proof", *["plan/plan"] * (len(ways) - 1)]
    trainer("part")
    first = next(iter(expected))
    done = trainer("trl", endpoint=server.endpoint, checkpoint=checkpoints / first, port=free_port())
    assert done["error"] is None, done
    assert server.tokens() == expected[first]


def answered(trainers: list[Any]) -> None:
    for answer in [trainer.answer() for trainer in trainers]:
        assert answer["error"] is None, answer


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
    server = serve(a, *option, VLLM_CPU_OMP_THREADS_BIND=cores(2))
    for path, *way in ((b,), (a,), (b, "--method", "direct"), (a,)):
        done = update(path, server, *two_workers, *way)
        assert done.returncode == 0, done.stderr
        assert verify(path, server, *two_workers).returncode == 0
    assert [worker["last_update"]["reload"] for worker in server.rpc("checkpoint_engine_status")] == ["plan", "plan"]
    assert verify(b, server, *two_workers).returncode == 1
    server.close()
