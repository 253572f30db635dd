"""Real SGLang with a dense model and one worker, from closed to serving, and whatever can go wrong on the way.

The tests share one server and run in order; each brings it to what it needs first.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine_sglang import SGLangClient
from tests.rolling import Sender
from tests.sglang.sglang_push import InTreeAnswer, broken, in_tree, push, read
from tests.sglang.sglang_server import Server, Stream
from tests.sharded import ShardingTrainer

Update = Callable[..., "subprocess.CompletedProcess[str]"]
SGLANG = ("--engine", "sglang")
TINY_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "0.00001"}
"""10 KB: smaller than any layer."""


@pytest.fixture(scope="module")
def cold(serve_all: Callable[..., Server]) -> dict[str, dict[str, Any]]:
    """What fresh servers say and hold."""
    states = {}
    for name in ("qwen3", "qwen3-b"):
        server = serve_all(name)
        states[name] = server.state()
        server.close()
    assert states["qwen3"]["tokens"] != states["qwen3-b"]["tokens"]
    return states


@pytest.fixture(scope="module")
def closed(serve_all: Callable[..., Server], cold: dict[str, Any]) -> Server:
    """Waits for its first weights; nothing was sent yet."""
    return serve_all(
        "qwen3",
        *("--load-format", "dummy", "--wait-for-initial-weights"),
        until="/checkpoint_engine/status",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="2",
    )


@pytest.fixture(scope="module")
def weights(checkpoints: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: read(checkpoints / name) for name in ("qwen3", "qwen3-b")}


@pytest.fixture
def on_a(closed: Server, weights: dict[str, Any]) -> Server:
    """Serves `qwen3`."""
    closed.fault()
    status = closed.status()
    if status["closed"] or status["workers"][0]["version"] != "qwen3":
        push(closed, weights["qwen3"], "qwen3")
    closed.wait("/health")
    return closed


def ping_when_closed(server: Server) -> int:
    """Before 0.5.23 SGLang's own script sends nothing until this one is open."""
    version = tuple(map(int, server.status()["sglang"].split(".")[:3]))
    return 503 if version >= (0, 5, 23) else 200


def test_it_is_closed_until_its_weights_are_there(closed: Server, update_command: Update, checkpoints: Path) -> None:
    assert closed.http.get("/ping").status_code == ping_when_closed(closed)
    for path in ("/health", "/ready", "/health_generate", "/v1/models", "/get_load", "/"):
        reply = closed.http.get(path)
        assert (reply.status_code, path) == (503, path)
        assert "initial weights" in reply.json()["error"]["message"]
    for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/encode"):
        reply = closed.http.post(path, json={"text": "x", "prompt": "x"})
        assert (reply.status_code, path) == (503, path)
    # What brings the weights, and what only looks, is open.
    assert closed.http.get("/model_info").status_code == 200
    # SGLANG_WAIT_WEIGHTS_READY_TIMEOUT passes: it says so, and stays closed.
    closed.wait("/checkpoint_engine/status")
    end = time.monotonic() + 30
    while "have not come within" not in closed.http.get("/health").text:
        assert time.monotonic() < end
        time.sleep(0.1)
    reply = closed.http.get("/health")
    assert (reply.status_code, closed.http.post("/generate", json={"text": "x"}).status_code) == (503, 503)
    assert "no initial weights within" in closed.log.read_text()
    status = closed.status()
    assert (status["waiting"], status["lost_hooks"]) == (True, {})


def test_a_refused_first_update_leaves_it_closed(closed: Server, weights: dict[str, Any]) -> None:
    incomplete = {name: tensor for name, tensor in weights["qwen3"].items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointEngineError, match=r"model\.norm\.weight"):
        push(closed, incomplete, "qwen3")
    assert closed.http.get("/health").status_code == 503
    assert closed.http.post("/generate", json={"text": "x"}).status_code == 503


def test_the_first_update_opens_it(
    closed: Server, update_command: Update, checkpoints: Path, cold: dict[str, Any]
) -> None:
    done = update_command(checkpoints / "qwen3", closed, "--engine", "auto")
    assert done.returncode == 0, done.stderr
    closed.wait("/health")
    assert closed.http.get("/ping").status_code == 200
    assert closed.state() == cold["qwen3"]
    assert closed.weight_version() == "qwen3"


def test_from_a_to_b_and_back(
    on_a: Server, update_command: Update, checkpoints: Path, cold: dict[str, Any], weights: dict[str, Any]
) -> None:
    done = update_command(checkpoints / "qwen3-b", on_a, "--engine", "sglang", **TINY_BUCKETS)
    assert done.returncode == 0, done.stderr
    assert on_a.state() == cold["qwen3-b"]
    assert on_a.weight_version() == "qwen3-b"
    push(on_a, weights["qwen3"], "qwen3")
    assert on_a.state() == cold["qwen3"]


def test_by_plan_and_directly(
    on_a: Server, update_command: Update, checkpoints: Path, cold: dict[str, Any], weights: dict[str, Any]
) -> None:
    push(on_a, weights["qwen3-b"], "qwen3-b")
    for name, how, way in (
        ("qwen3", ("--reload", "plan"), "by reload plan"),
        ("qwen3-b", ("--method", "direct", "--reload", "plan"), "by reload plan"),
        ("qwen3", ("--method", "auto", "--reload", "loader"), "by the engine's own loader"),
    ):
        done = update_command(checkpoints / name, on_a, "--engine", "sglang", *how)
        assert done.returncode == 0, done.stderr
        assert way in done.stdout + done.stderr
        assert on_a.state() == cold[name]


def test_shards_of_a_trainer_are_served_as_after_a_cold_start(
    on_a: Server, cold: dict[str, Any], weights: dict[str, Any]
) -> None:
    trainer = ShardingTrainer(1, SGLangClient(on_a.endpoint))
    for dealing in ("rows", "columns", "uneven"):
        for method, name in (("broadcast", "qwen3-b"), ("direct", "qwen3")):
            trainer.step(weights[name], dealing, method, name)
            assert on_a.state() == cold[name]
    trainer.close()


def test_some_tensors_only(
    on_a: Server,
    update_command: Update,
    verify_command: Update,
    checkpoints: Path,
    cold: dict[str, Any],
    weights: dict[str, Any],
) -> None:
    """Two parts make the whole, and a part is taken back by itself; what is fused comes whole or not at all."""
    layer = "model.layers.1.*"
    rest = [name for name in weights["qwen3"] if not name.startswith(layer[:-1])]
    for name, part, how, expected in (
        ("qwen3-b", [layer], {}, None),
        ("qwen3", [layer], {"method": "direct"}, "qwen3"),
        ("qwen3-b", [layer], {"reload": "loader"}, None),
        ("qwen3-b", rest, {}, "qwen3-b"),
    ):
        push(on_a, weights[name], f"part of {name}", only=part, **how)
        state = on_a.state()
        assert state == cold[expected] if expected else state not in cold.values()
        worker = on_a.status()["workers"][0]
        assert (worker["version"], worker["partial"], worker["whole_version"]) == (f"part of {name}", True, "qwen3")
    same, other = (verify_command(checkpoints / each, on_a, *SGLANG, "--only", layer) for each in ("qwen3-b", "qwen3"))
    assert (same.returncode, other.returncode) == (0, 1), same.stdout + same.stderr + other.stdout
    with pytest.raises(CheckpointEngineError, match=r"model\.layers\.1\.self_attn\.qkv_proj\.weight"):
        push(on_a, weights["qwen3"], only=["*.1.self_attn.q_proj.*"])
    assert on_a.state() == cold["qwen3-b"]
    push(on_a, weights["qwen3"], "qwen3")
    assert on_a.state() == cold["qwen3"]
    assert on_a.status()["workers"][0]["partial"] is False


def test_the_weights_are_compared_with_a_checkpoint(
    on_a: Server, verify_command: Update, checkpoints: Path, cold: dict[str, Any]
) -> None:
    equal = verify_command(checkpoints / "qwen3", on_a, "--engine", "sglang")
    assert equal.returncode == 0, equal.stdout + equal.stderr
    other = verify_command(checkpoints / "qwen3-b", on_a, "--engine", "sglang")
    assert other.returncode == 1, other.stderr
    assert "different: lm_head.weight, model.embed_tokens.weight" in other.stdout
    assert on_a.state() == cold["qwen3"]
    assert on_a.status()["workers"][0]["version"] == "qwen3"


@pytest.mark.parametrize("pause", ["keep", "abort", "wait", "none"])
def test_each_pause_mode_of_an_idle_engine(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any], pause: str
) -> None:
    push(on_a, weights["qwen3-b"], f"after-{pause}", pause=pause)
    assert on_a.state() == cold["qwen3-b"]
    assert on_a.weight_version() == f"after-{pause}"


@pytest.mark.parametrize("reset_caches", [True, False])
def test_a_request_in_flight_is_kept(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any], reset_caches: bool
) -> None:
    """Retracted and computed anew with the new weights; or, with its cache, in place."""
    on_a.fault(slow=0.05)
    stream = Stream(on_a, 300)
    stream.wait_for(10)
    push(on_a, weights["qwen3-b"], "qwen3-b", reset_caches=reset_caches)
    before = len(stream.tokens)
    on_a.fault()
    stream.join()
    assert stream.error is None
    assert stream.finish is not None
    assert stream.finish["type"] == "length"
    assert 10 <= before < 300 == len(stream.tokens)
    assert stream.tokens[:10] == cold["qwen3"]["tokens"][0][:10]
    if reset_caches:
        assert on_a.state() == cold["qwen3-b"]
    else:
        on_a.http.post("/flush_cache")


def test_a_request_in_flight_is_aborted(on_a: Server, weights: dict[str, Any], cold: dict[str, Any]) -> None:
    on_a.fault(slow=0.05)
    stream = Stream(on_a, 1000)
    stream.wait_for(10)
    push(on_a, weights["qwen3-b"], "qwen3-b", pause="abort")
    on_a.fault()
    stream.join()
    assert 10 <= len(stream.tokens) < 1000
    assert on_a.state() == cold["qwen3-b"]


def test_a_request_in_flight_is_waited_for(on_a: Server, weights: dict[str, Any], cold: dict[str, Any]) -> None:
    on_a.fault(slow=0.02)
    stream = Stream(on_a, 100)
    stream.wait_for(10)
    push(on_a, weights["qwen3-b"], "qwen3-b", pause="wait")
    stream.join()
    on_a.fault()
    assert len(stream.tokens) == 100
    assert on_a.state() == cold["qwen3-b"]


def test_a_cache_in_use_is_not_flushed_under_its_requests(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any]
) -> None:
    on_a.fault(slow=0.05)
    stream = Stream(on_a, 100)
    stream.wait_for(10)
    with pytest.raises(CheckpointEngineError, match="hold the cache"):
        push(on_a, weights["qwen3-b"], "qwen3-b", pause="none")
    on_a.fault()
    stream.join()
    assert stream.tokens[:12] == cold["qwen3"]["tokens"][0]
    assert on_a.state() == cold["qwen3"]


FAULTS = {
    "missing": r"model\.layers\.1\.mlp\.gate_up_proj\.weight",
    "unknown": r"nonsense\.weight",
    "too long": r"model\.layers\.0\.mlp\.down_proj\.weight",
    "too short": r"model\.layers\.0\.mlp\.down_proj\.weight",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", ["our client", "SGLang's own request"])
def test_what_does_not_fit_is_refused_and_the_old_weights_go_on_serving(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any], fault: str, path: str
) -> None:
    answer = InTreeAnswer()
    ask = None if path == "our client" else in_tree(on_a, answer)
    with pytest.raises(CheckpointEngineError, match=FAULTS[fault]):
        push(on_a, broken(weights["qwen3-b"], fault), "qwen3-b", ask=ask)
    if ask is not None:
        assert answer.status == 400
        assert "worker 0 failed in" in answer.message
    status = on_a.status()
    assert (status["dirty"], status["closed"], status["workers"][0]["version"]) == (False, "", "qwen3")
    assert on_a.state() == cold["qwen3"]


def test_a_loader_that_fails_in_the_middle_closes_it_until_a_full_update(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", "0.00001")
    on_a.fault(tensor="model.layers.1.self_attn.o_proj.weight")
    with pytest.raises(CheckpointEngineError, match="a fault made by the test"):
        push(on_a, weights["qwen3-b"], "qwen3-b", reload="loader")
    on_a.fault()
    assert on_a.status()["dirty"] is True
    assert on_a.http.get("/ping").status_code == ping_when_closed(on_a)
    for path in ("/health", "/v1/models"):
        reply = on_a.http.get(path)
        assert (reply.status_code, "mixture" in reply.text) == (503, True)
    assert on_a.http.post("/generate", json={"text": "x"}).status_code == 503
    assert on_a.http.post("/continue_generation", json={}).status_code == 503
    # What is refused does not heal.
    with pytest.raises(CheckpointEngineError):
        push(on_a, broken(weights["qwen3-b"], "missing"), "qwen3-b")
    assert on_a.http.get("/health").status_code == 503
    push(on_a, weights["qwen3-b"], "qwen3-b")
    on_a.wait("/health")
    assert on_a.state() == cold["qwen3-b"]
    assert on_a.status()["dirty"] is False


FAULT_IN_THE_MIDDLE = {"tensor": "model.layers.1.self_attn.o_proj.weight", "once": True}


@pytest.mark.parametrize("method", ["broadcast", "direct"])
def test_after_a_failure_in_the_middle_the_old_weights_come_back_from_memory(
    on_a: Server, checkpoints: Path, cold: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", TINY_BUCKETS["PS_MAX_BUCKET_SIZE_GB"])
    with Sender(SGLangClient(on_a.endpoint)) as sender:
        for name in ("qwen3", "qwen3-b"):
            sender.hold(checkpoints / name)
        sender.update("qwen3", method)
        on_a.fault(**FAULT_IN_THE_MIDDLE)
        sender.fails_and_goes_back("qwen3-b", "qwen3", method)
        assert_serves(on_a, cold, "qwen3")
        sender.update("qwen3-b", method)
        assert_serves(on_a, cold, "qwen3-b")


def test_after_a_failure_in_the_middle_the_old_weights_come_back_from_files(
    on_a: Server, update_command: Update, checkpoints: Path, cold: dict[str, Any]
) -> None:
    on_a.fault(**FAULT_IN_THE_MIDDLE)
    how = ("--engine", "sglang", "--reload", "loader", "--rollback-to", str(checkpoints / "qwen3"), "--json")
    done = update_command(checkpoints / "qwen3-b", on_a, *how, **TINY_BUCKETS)
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert (said["rolled_back"], said["held"], said["phase"]) == ("qwen3", "old", "load")
    assert "a fault made by the test" in said["message"]
    assert "its weights are a mixture now" in said["message"]
    assert_serves(on_a, cold, "qwen3")


def assert_serves(server: Server, cold: dict[str, Any], version: str) -> None:
    """It holds what a cold start of that version holds, says so, and is open."""
    assert server.http.get("/health").status_code == 200
    assert server.state() == cold[version]
    assert server.weight_version() == version
    status = server.status()
    assert (status["dirty"], status["closed"], status["workers"][0]["version"]) == (False, "", version)


@pytest.mark.parametrize("path", ["our client", "SGLang's own request"])
def test_processing_that_fails_is_told_by_the_name_of_its_layer(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any], path: str
) -> None:
    on_a.fault(process=True)
    answer = InTreeAnswer()
    ask = None if path == "our client" else in_tree(on_a, answer)
    with pytest.raises(CheckpointEngineError, match=r"layer model\.layers\.0\.self_attn\.qkv_proj .*made by the test"):
        push(on_a, weights["qwen3-b"], "qwen3-b", ask=ask)
    on_a.fault()
    assert on_a.http.get("/health").status_code == 503
    assert on_a.http.post("/generate", json={"text": "x"}).status_code == 503
    push(on_a, weights["qwen3"], "qwen3")
    on_a.wait("/health")
    assert on_a.state() == cold["qwen3"]


def test_a_wrong_handle_ends_the_update_in_bounded_time(on_a: Server, weights: dict[str, Any]) -> None:
    def nowhere(handles: dict[str, str]) -> None:
        in_tree(on_a, answer)({"cpu:0": "unix:///nowhere/at/all#token"})

    answer = InTreeAnswer()
    with pytest.raises(CheckpointEngineError):
        push(on_a, weights["qwen3-b"], "qwen3-b", ask=nowhere, timeout=20)
    assert answer.status == 400
    on_a.wait("/health", seconds=5)
    with pytest.raises(CheckpointEngineError):
        push(on_a, weights["qwen3-b"], ask=lambda handles: in_tree(on_a, answer)({**handles, "cpu:1": "x"}), timeout=20)
    assert "weights for 2 workers" in answer.message
    on_a.wait("/health", seconds=5)


def test_weights_whose_memory_is_released_are_not_written(
    on_a: Server, weights: dict[str, Any], cold: dict[str, Any]
) -> None:
    assert on_a.http.post("/release_memory_occupation", json={"tags": ["weights"]}).status_code == 200
    with pytest.raises(CheckpointEngineError, match="resume_memory_occupation"):
        push(on_a, weights["qwen3-b"], "qwen3-b")
    assert on_a.http.post("/resume_memory_occupation", json={"tags": ["weights"]}).status_code == 200
    push(on_a, weights["qwen3-b"], "qwen3-b")
    assert on_a.state() == cold["qwen3-b"]


def test_sglangs_own_update_script(
    on_a: Server, sglang_python: Path, checkpoints: Path, cold: dict[str, Any], tmp_path: Path
) -> None:
    command = [
        *(sglang_python, "-m", "sglang.srt.checkpoint_engine.update", "--checkpoint-path", checkpoints / "qwen3-b"),
        *("--endpoint", on_a.endpoint, "--inference-parallel-size", "1", "--update-method", "broadcast"),
        *("--weight-version", "by-script", "--save-metas-file", tmp_path / "metas.pkl"),
    ]
    path = os.pathsep.join((str(sglang_python.parent), os.environ["PATH"]))  # it starts torchrun
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metas.pkl").stat().st_size
    assert on_a.state() == cold["qwen3-b"]
    assert on_a.weight_version() == "by-script"


def test_it_ends_when_it_is_told_to(serve: Callable[..., Server]) -> None:
    waiting = serve("qwen3", "--load-format", "dummy", "--wait-for-initial-weights", until="/checkpoint_engine/status")
    waiting.process.terminate()
    waiting.process.wait(timeout=60)
