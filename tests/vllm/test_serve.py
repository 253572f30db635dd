"""`checkpoint-engine update` against real `vllm serve`: what is generated afterwards is what a cold start generates."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine_vllm import VllmClient
from tests.core.streams import TokenStream
from tests.core.test_shards import tensors_of
from tests.rolling import Sender
from tests.sharded import ShardingTrainer
from tests.vllm.conftest import completion

Cold = Callable[..., dict[str, Any]]
Serve = Callable[..., Any]
Update = Callable[..., "subprocess.CompletedProcess[str]"]

HERE = Path(__file__).parent
TINY_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "0.00001"}
"""10 KB: smaller than any layer."""


def test_from_dummy_weights_to_a_to_b_and_back(
    serve: Serve, update: Update, cold: Cold, checkpoints: Path, tmp_path: Path
) -> None:
    kind = "tied"
    expected = {name: cold(name)["tokens"] for name in (kind, f"{kind}-b")}
    # No --worker-extension-cls: installing the package is all the set-up.
    server = serve(kind, "--load-format", "dummy", socket_path=tmp_path / "vllm.sock")
    assert server.tokens() not in expected.values()
    for name in (kind, f"{kind}-b", kind):
        done = update(checkpoints / name, server, **TINY_BUCKETS)
        assert done.returncode == 0, done.stderr
        assert server.tokens() == expected[name]
        assert server.get("/weight_info") == {"weight_version": name}
    server.close()


def test_without_development_mode_and_beside_another_extension(
    serve: Serve, update: Update, verify: Update, cold: Cold, checkpoints: Path, tmp_path: Path
) -> None:
    expected = {name: cold(name)["tokens"] for name in ("moe", "moe-b")}
    server = serve(
        "moe",
        *("--load-format", "dummy", "--worker-extension-cls", "other_extension.Other"),
        PYTHONPATH=str(HERE),
        VLLM_PLUGINS="checkpoint_engine",
        VLLM_SERVER_DEV_MODE="0",
        VLLM_API_KEY="secret",
    )
    closed = update(checkpoints / "moe", server)
    assert (closed.returncode, "CHECKPOINT_ENGINE_API_KEY" in closed.stderr) == (1, True), closed.stderr
    key = {"CHECKPOINT_ENGINE_API_KEY": "secret"}
    for name in ("moe", "moe-b", "moe"):
        done = update(checkpoints / name, server, **TINY_BUCKETS, **key)
        assert done.returncode == 0, done.stderr
        assert server.tokens() == expected[name]
        status = server.get("/v1/checkpoint_engine/status")
        assert (status["weight_version"], status["paused"], status["workers"][0]["version"]) == (name, False, name)
    assert verify(checkpoints / "moe", server, **key).returncode == 0
    assert server.http.post("/pause").status_code == 404
    assert_told_by_metrics(server, updates=3)
    incomplete = renamed(checkpoints / "moe-b", tmp_path / "incomplete", {"model.norm.weight": None})
    assert update(incomplete, server, **key).returncode == 1
    assert_told_by_metrics(server, updates=3, rejected=1)
    server.close()


def metrics_of(server: Any) -> dict[str, float]:
    """VLLM's own `/metrics`."""
    lines = [line.rpartition(" ") for line in server.http.get("/metrics").text.splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in lines}


def failures_in(told: dict[str, float]) -> dict[str, float]:
    """Failed updates by class of error."""
    labelled = re.compile(r'checkpoint_engine_update_failures_total\{kind="(\w+)",phase="update"\}')
    found = ((labelled.fullmatch(name), value) for name, value in told.items())
    return {match[1]: value for match, value in found if match}


def assert_told_by_metrics(server: Any, *, updates: int, rejected: int = 0) -> None:
    """Ours, and vLLM's own of weight updates, failed ones too; comparisons are in neither."""
    told = metrics_of(server)
    assert failures_in(told) == ({"WeightsRejectedError": rejected} if rejected else {})
    for phase in ("check", "load", "finish", "total"):
        assert told[f'checkpoint_engine_update_seconds_count{{phase="{phase}"}}'] == updates
    assert told['vllm:rl_weight_update_operation_duration_seconds_count{operation="update"}'] == updates + rejected
    assert told["checkpoint_engine_update_bytes_total"] > updates * 1e6
    assert told["checkpoint_engine_update_bytes_per_second"] > 0
    assert told["checkpoint_engine_weights_dirty"] == 0
    assert told['checkpoint_engine_weights_version_info{version="moe"}'] == 1


@pytest.fixture(scope="module")
def dense(serve: Serve) -> Any:
    """A dense model, started with dummy weights; tests bring it to what they need first."""
    return serve(
        "qwen3",
        *("--load-format", "dummy", "--worker-extension-cls", "faulty_extension.FaultyExtension"),
        PYTHONPATH=str(HERE),
    )


@pytest.fixture
def serving_a(dense: Any, update: Update, checkpoints: Path) -> Any:
    status = dense.rpc("checkpoint_engine_status")[0]
    if (status["version"], status["dirty"]) != ("qwen3", False):
        assert update(checkpoints / "qwen3", dense).returncode == 0
    return dense


def test_dense_from_dummy_weights_to_a_to_b_and_back(dense: Any, update: Update, cold: Cold, checkpoints: Path) -> None:
    expected = {name: cold(name)["tokens"] for name in ("qwen3", "qwen3-b")}
    assert dense.tokens() not in expected.values()
    for name, environment in (("qwen3", {}), ("qwen3-b", TINY_BUCKETS), ("qwen3", TINY_BUCKETS)):
        done = update(checkpoints / name, dense, **environment)
        assert done.returncode == 0, done.stderr
        assert dense.tokens() == expected[name]


def test_shards_of_a_trainer_are_served_as_after_a_cold_start(
    serving_a: Any, verify: Update, cold: Cold, checkpoints: Path
) -> None:
    trainer = ShardingTrainer(1, VllmClient(serving_a.endpoint))
    for dealing in ("rows", "columns", "uneven", "grid"):
        for method, name in (("broadcast", "qwen3-b"), ("direct", "qwen3")):
            trainer.step(tensors_of(checkpoints / name), dealing, method, name)
            assert serving_a.tokens() == cold(name)["tokens"]
            assert serving_a.rpc("checkpoint_engine_status")[0]["last_update"]["reload"] in {"proof", "plan"}
    trainer.close()
    assert verify(checkpoints / "qwen3", serving_a).returncode == 0


def test_the_weights_are_compared_with_a_checkpoint(
    serving_a: Any, verify: Update, cold: Cold, checkpoints: Path
) -> None:
    equal = verify(checkpoints / "qwen3", serving_a, "--json")
    assert (equal.returncode, json.loads(equal.stdout)["ok"]) == (0, True), equal.stderr
    other = verify(checkpoints / "qwen3-b", serving_a)
    assert other.returncode == 1, other.stderr
    assert "different: model.embed_tokens.weight" in other.stdout
    assert serving_a.tokens() == cold("qwen3")["tokens"]
    assert serving_a.rpc("checkpoint_engine_status")[0]["version"] == "qwen3"


@pytest.mark.parametrize("pause", ["keep", "wait", "abort", "none"])
def test_each_pause_mode_of_an_idle_engine(
    serving_a: Any, update: Update, cold: Cold, checkpoints: Path, pause: str
) -> None:
    done = update(checkpoints / "qwen3-b", serving_a, "--pause", pause, "--version", f"after-{pause}")
    assert done.returncode == 0, done.stderr
    assert serving_a.tokens() == cold("qwen3-b")["tokens"]
    assert serving_a.get("/is_paused") == {"is_paused": False}
    assert serving_a.rpc("checkpoint_engine_status")[0]["version"] == f"after-{pause}"


@pytest.fixture
def slow(serving_a: Any) -> Iterator[Any]:
    """Slow enough for a request to last as long as any update, until `rpc` speeds it up again."""
    serving_a.rpc("checkpoint_engine_test_slow", 0.05)
    yield serving_a
    serving_a.rpc("checkpoint_engine_test_slow", 0)


@pytest.mark.parametrize("pause", ["keep", "none"])
def test_a_request_in_flight_goes_on_with_the_new_weights(
    slow: Any, update: Update, cold: Cold, checkpoints: Path, pause: str
) -> None:
    length = 3000
    stream = Stream(slow.endpoint, length)
    stream.wait_for(20)
    keep_caches = ["--keep-caches"] if pause == "none" else []
    done = update(checkpoints / "qwen3-b", slow, "--pause", pause, *keep_caches)
    assert done.returncode == 0, done.stderr
    before_update = len(stream.tokens)
    slow.rpc("checkpoint_engine_test_slow", 0)
    stream.join()
    assert stream.error is None
    assert len(stream.tokens) == length
    assert 20 <= before_update < length
    assert stream.tokens[:16] == cold("qwen3")["tokens"][0]
    if pause == "keep":
        assert slow.tokens() == cold("qwen3-b")["tokens"]


def test_an_aborted_request_ends_and_the_next_gets_the_new_weights(
    slow: Any, update: Update, cold: Cold, checkpoints: Path
) -> None:
    stream = Stream(slow.endpoint, 4000)
    stream.wait_for(20)
    done = update(checkpoints / "qwen3-b", slow, "--pause", "abort")
    assert done.returncode == 0, done.stderr
    slow.rpc("checkpoint_engine_test_slow", 0)
    stream.join()
    assert 20 <= len(stream.tokens) < 4000
    assert slow.tokens() == cold("qwen3-b")["tokens"]


def test_a_request_that_is_waited_for_ends_with_the_old_weights(
    slow: Any, update: Update, cold: Cold, checkpoints: Path
) -> None:
    stream = Stream(slow.endpoint, 200)
    stream.wait_for(20)
    done = update(checkpoints / "qwen3-b", slow, "--pause", "wait")
    assert done.returncode == 0, done.stderr
    stream.join()
    assert len(stream.tokens) == 200
    slow.rpc("checkpoint_engine_test_slow", 0)
    after = Stream(slow.endpoint, 200)
    after.join()
    assert after.tokens != stream.tokens
    assert slow.tokens() == cold("qwen3-b")["tokens"]


@pytest.mark.parametrize(("fault", "named"), [("unknown", "nonsense.weight"), ("missing", "model.norm.weight")])
def test_what_does_not_fit_is_refused_and_the_old_weights_go_on_serving(
    serving_a: Any, update: Update, cold: Cold, checkpoints: Path, tmp_path: Path, fault: str, named: str
) -> None:
    rename = {"model.norm.weight": "nonsense.weight"} if fault == "unknown" else {"model.norm.weight": None}
    broken = renamed(checkpoints / "qwen3-b", tmp_path / "broken", rename)
    done = update(broken, serving_a)
    assert done.returncode != 0
    assert named in done.stderr
    assert "WeightsRejectedError" in done.stderr
    assert serving_a.get("/is_paused") == {"is_paused": False}
    assert serving_a.tokens() == cold("qwen3")["tokens"]
    status = serving_a.rpc("checkpoint_engine_status")[0]
    assert (status["dirty"], status["version"]) == (False, "qwen3")
    assert named in status["error"]


def test_the_wrong_tensor_parallel_size_is_refused(
    serving_a: Any, update: Update, cold: Cold, checkpoints: Path
) -> None:
    done = update(checkpoints / "qwen3-b", serving_a, "--tensor-parallel-size", "2")
    assert done.returncode != 0
    assert "--tensor-parallel-size" in done.stderr
    assert serving_a.get("/is_paused") == {"is_paused": False}
    assert serving_a.tokens() == cold("qwen3")["tokens"]


def test_a_loader_that_fails_at_once_leaves_the_old_weights_serving(
    serving_a: Any, update: Update, cold: Cold, checkpoints: Path
) -> None:
    serving_a.rpc("checkpoint_engine_test_break", 0)
    done = update(checkpoints / "qwen3-b", serving_a, "--reload", "loader")  # a plan would not call what is broken
    serving_a.rpc("checkpoint_engine_test_break", -1)
    assert done.returncode != 0
    assert "a fault made by the test" in done.stderr
    assert serving_a.get("/is_paused") == {"is_paused": False}
    assert serving_a.tokens() == cold("qwen3")["tokens"]


def test_a_loader_that_fails_in_the_middle_leaves_the_engine_paused_until_a_full_update(
    serving_a: Any, update: Update, cold: Cold, checkpoints: Path
) -> None:
    serving_a.rpc("checkpoint_engine_test_break", 12)
    done = update(checkpoints / "qwen3-b", serving_a, "--reload", "loader", **TINY_BUCKETS)
    serving_a.rpc("checkpoint_engine_test_break", -1)
    assert done.returncode != 0
    assert "a fault made by the test" in done.stderr
    assert serving_a.get("/is_paused") == {"is_paused": True}
    assert serving_a.rpc("checkpoint_engine_status")[0]["dirty"] is True
    healed = update(checkpoints / "qwen3-b", serving_a)
    assert healed.returncode == 0, healed.stderr
    assert serving_a.get("/is_paused") == {"is_paused": False}
    assert serving_a.rpc("checkpoint_engine_status")[0]["dirty"] is False
    assert serving_a.tokens() == cold("qwen3-b")["tokens"]


@pytest.mark.parametrize("method", ["broadcast", "direct"])
def test_after_a_failure_in_the_middle_the_old_weights_come_back_from_memory(
    serving_a: Any, cold: Cold, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", TINY_BUCKETS["PS_MAX_BUCKET_SIZE_GB"])
    with Sender(VllmClient(serving_a.endpoint)) as sender:
        for name in ("qwen3", "qwen3-b"):
            sender.hold(checkpoints / name)
        sender.update("qwen3", method)
        break_in_the_middle(serving_a)
        sender.fails_and_goes_back("qwen3-b", "qwen3", method)
        assert_serves(serving_a, cold("qwen3"), "qwen3")
        sender.update("qwen3-b", method)
        assert_serves(serving_a, cold("qwen3-b"), "qwen3-b")


def test_after_a_failure_in_the_middle_the_old_weights_come_back_from_files(
    serving_a: Any, update: Update, cold: Cold, checkpoints: Path
) -> None:
    break_in_the_middle(serving_a)
    how = ("--reload", "loader", "--rollback-to", str(checkpoints / "qwen3"), "--json")
    done = update(checkpoints / "qwen3-b", serving_a, *how, **TINY_BUCKETS)
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert (said["rolled_back"], said["held"], said["phase"]) == ("qwen3", "old", "load")
    assert "a fault made by the test" in said["message"]
    assert "its weights are a mixture now" in said["message"]
    assert_serves(serving_a, cold("qwen3"), "qwen3")


def break_in_the_middle(server: Any) -> None:
    server.rpc("checkpoint_engine_test_break", 12, True)


def assert_serves(server: Any, cold: dict[str, Any], version: str) -> None:
    """It holds what a cold start of that version holds, says so, and is open."""
    assert server.get("/is_paused") == {"is_paused": False}
    assert server.tokens() == cold["tokens"]
    assert server.rpc("checkpoint_engine_test_fingerprint") == [cold["served"]]
    (status,) = server.rpc("checkpoint_engine_status")
    assert (status["version"], status["dirty"], status["updating"]) == (version, False, False)


class Stream(TokenStream):
    """A completion of a running vLLM."""

    def __init__(self, url: str, length: int) -> None:
        super().__init__(f"{url}/v1/completions", completion("Hello, my name is", length) | {"stream": True})

    def take(self, answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            self.tokens.extend(choice.get("token_ids") or [])


def renamed(source: Path, target: Path, names: dict[str, str | None]) -> Path:
    """A copy of a checkpoint in which tensors have other names, or (None) are gone."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    (target / "model.safetensors.index.json").unlink()
    for file in target.glob("*.safetensors"):
        tensors = {names.get(name, name): tensor for name, tensor in load_file(file).items()}
        save_file({name: tensor for name, tensor in tensors.items() if name is not None}, file)
    return target
