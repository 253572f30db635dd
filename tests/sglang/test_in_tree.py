"""What SGLang's own path does where the plugin does otherwise: each defect shown without the plugin, gone with it.

`ours=False` starts SGLang without our plugin; its own worker then runs with our core in place of upstream's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from checkpoint_engine.errors import CheckpointEngineError
from tests.sglang.sglang_push import InTreeAnswer, broken, in_tree, push, read
from tests.sglang.sglang_server import Server

Serve = Callable[..., Server]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def a(checkpoints: Path) -> Tensors:
    return read(checkpoints / "qwen3")


@pytest.fixture(scope="module")
def b(checkpoints: Path) -> Tensors:
    return read(checkpoints / "qwen3-b")


def test_one_worker_without_the_plugin(serve: Serve, a: Tensors, b: Tensors) -> None:
    """With the plugin: test_dense.py."""
    server = serve("qwen3", ours=False)
    expected = server.state()
    answer = InTreeAnswer()
    ask = in_tree(server, answer)
    # SGLang's worker runs with our core.
    push(server, b, ask=ask)
    assert answer.status == 200
    assert server.state() != expected
    push(server, a, ask=ask)
    assert server.state() == expected

    # Tensors that are missing, and unknown ones: success, and a model that is neither the old nor the new.
    for fault in ("missing", "unknown"):
        push(server, broken(b, fault), ask=ask)
        assert answer.status == 200
        assert server.http.get("/health").status_code == 200
        push(server, a, ask=ask)
    # Processing that fails: success.
    server.fault(process=True)
    push(server, b, ask=ask)
    assert answer.status == 200
    server.fault()
    push(server, a, ask=ask)
    # A tensor of the wrong shape: an error, but half of the new weights serve on.
    with pytest.raises(CheckpointEngineError):
        push(server, broken(b, "too long"), ask=ask)
    assert answer.status == 400
    assert server.http.get("/health").status_code == 200
    assert server.http.post("/generate", json={"text": "x"}).status_code == 200
    (held,) = server.checksums()
    assert held != expected["checksums"][0]


def test_two_workers_without_the_plugin(serve: Serve, b: Tensors) -> None:
    """With the plugin: test_parallel.py."""
    server = serve(
        "qwen3",
        *("--tp-size", "2", "--load-format", "dummy", "--checkpoint-engine-wait-weights-before-ready"),
        ours=False,
        workers=2,
        until="/model_info",
        SGLANG_WAIT_WEIGHTS_READY_TIMEOUT="8",
    )
    # It answers with dummy weights while it waits; and after its time-out it is healthy with them.
    parameters = {"max_new_tokens": 4}
    assert server.http.post("/generate", json={"text": "x", "sampling_params": parameters}).status_code == 200
    server.wait("/health", seconds=120)
    # A worker that no weights are sent to: success, as the first worker has them; and a mixture serves.
    answer, before = InTreeAnswer(), server.checksums()
    push(replace(server, workers=1), b, ask=in_tree(server, answer))
    assert answer.status == 200
    after = server.checksums()
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)
    assert server.http.get("/health").status_code == 200


def test_pipeline_stages_without_the_plugin(serve: Serve, b: Tensors) -> None:
    """With the plugin: test_parallel.py."""
    server = serve("qwen3", "--pp-size", "2", ours=False, workers=2)

    def ask(handles: dict[str, str]) -> None:
        body = {"zmq_handles": handles}
        httpx.post(f"{server.endpoint}/update_weights_from_ipc", json=body, timeout=20).raise_for_status()

    with pytest.raises(CheckpointEngineError):
        push(server, b, ask=ask, timeout=15)


def test_replicas_without_the_plugin(serve: Serve, b: Tensors) -> None:
    """With the plugin: test_parallel.py."""
    server = serve("qwen3", "--dp-size", "2", ours=False, workers=2)
    answer = InTreeAnswer()
    with pytest.raises(CheckpointEngineError):
        push(server, b, ask=in_tree(server, answer), timeout=15)
    assert answer.status == 400
    assert "data-parallel replicas are not supported" in answer.message


def test_a_draft_model(serve: Serve, checkpoints: Path, a: Tensors, b: Tensors) -> None:
    """One receive feeds the served model and the draft; SGLang's own path connects twice to a handle for one."""
    without = serve("qwen3", ours=False, extra_plugins="second_model")
    answer = InTreeAnswer()
    with pytest.raises((CheckpointEngineError, httpx.HTTPError)):
        push(without, b, ask=in_tree(without, answer), timeout=15)
    assert answer.status != 200
    without.close()

    server = serve("qwen3", extra_plugins="second_model")
    for path in ("our client", "SGLang's own request"):
        for tensors, version in ((b, "b"), (a, "a")):
            ask = None if path == "our client" else in_tree(server, answer)
            push(server, tensors, version, ask=ask)
            server.wait("/health", seconds=10)
    assert answer.status == 200
    assert server.weight_version() == "a"


def test_several_tokenizer_workers_and_the_gate_do_not_go_together(serve: Serve) -> None:
    server = serve(
        "qwen3", "--load-format", "dummy", "--wait-for-initial-weights", "--tokenizer-worker-num", "2", until=""
    )
    assert server.process.wait(timeout=120) != 0
    assert "--tokenizer-worker-num 2" in server.log.read_text()
    assert "Start with --tokenizer-worker-num 1" in server.log.read_text()


def test_the_documented_flag_is_sglangs_own_only_with_the_plugin(serve: Serve) -> None:
    server = serve("qwen3", "--wait-for-initial-weights", ours=False, until="")
    assert server.process.wait(timeout=120) != 0
    assert "unrecognized arguments: --wait-for-initial-weights" in server.log.read_text()
