"""The ways into a real SGLang that has an administrator's key: who may ask, what is told, what is given up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine.link.channel import Listener
from checkpoint_engine_sglang import SGLangClient, routes
from tests.commands import run_command
from tests.sglang.sglang_push import push, read
from tests.sglang.sglang_server import Server

KEY = "of-the-administrator"
SHOWN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(serve_all: Callable[..., Server]) -> Server:
    found = serve_all("qwen3", "--load-format", "dummy", "--admin-api-key", KEY, "--enable-metrics", until="/v1/models")
    found.http.headers.update(SHOWN)
    return found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CHECKPOINT_ENGINE_API_KEY", KEY)
    return None


def metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.endpoint}/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] not in ("", "#"))
    }


def test_without_the_administrators_key_every_route_of_ours_is_closed(server: Server) -> None:
    for method, path in (
        ("GET", routes.STATUS),
        ("POST", routes.UPDATE),
        ("POST", routes.VERIFY),
        ("POST", routes.ABORT),
    ):
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            assert httpx.request(method, f"{server.endpoint}{path}", headers=shown).status_code == 401, path
    with pytest.raises(EngineRequestError, match="does not take the key"):
        SGLangClient(server.endpoint, api_key="wrong").wait_ready(Deadline(5))


def test_an_update_is_told_by_status_and_by_sglangs_own_version(server: Server, checkpoints: Path) -> None:
    before = server.status()
    assert (before["weight_version"], before["workers"][0]["version"]) == ("default", "")
    push(server, read(checkpoints / "qwen3-b"), "b")
    status = server.status()
    (worker,) = status["workers"]
    assert (worker["version"], worker["door"], worker["error"]) == ("b", routes.UPDATE, "")
    assert status["weight_version"] == server.weight_version() == "b"
    assert worker["last_update"]["reload"] == "proof"
    assert worker["last_update"]["load_seconds"] > 0
    done = run_command("status", "--endpoint", server.endpoint.removeprefix("http://"), "--json", timeout=60)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["endpoints"]
    assert found["workers"][0]["version"] == "b"
    assert found["workers"][0]["last_update"] == worker["last_update"]


def test_a_stalled_update_is_given_up_when_the_engine_is_told_to(server: Server) -> None:
    listener = Listener()  # a parameter server that says nothing
    try:
        with ThreadPoolExecutor(1) as pool:
            body = {"handles": [["cpu:0", listener.handle]], "version": "never", "timeout": 300}
            update = pool.submit(httpx.post, f"{server.endpoint}{routes.UPDATE}", json=body, headers=SHOWN, timeout=60)
            end = time.monotonic() + 20
            while not server.status()["updating"]:
                assert time.monotonic() < end
                time.sleep(0.05)
            start = time.monotonic()
            assert SGLangClient(server.endpoint).abort(Deadline(20)) is True
            assert time.monotonic() - start < 5
            reply = update.result(timeout=20)
    finally:
        listener.close()
    assert (reply.status_code, reply.json()["ok"]) == (500, False)
    assert "told to give the update up" in reply.json()["error"]
    (worker,) = server.status()["workers"]
    assert (worker["version"], worker["dirty"], worker["updating"]) == ("b", False, False)
    assert "told to give the update up" in worker["error"]
    assert SGLangClient(server.endpoint).abort(Deadline(20)) is False  # nothing is under way


def test_weights_that_sglangs_own_route_brought_are_named_as_it_names_them(server: Server, checkpoints: Path) -> None:
    body = {"model_path": str(checkpoints / "qwen3"), "load_format": "auto", "weight_version": "of theirs"}
    reply = server.http.post("/update_weights_from_disk", json=body).json()
    assert reply["success"], reply
    status = server.status()
    (worker,) = status["workers"]
    assert (worker["version"], status["weight_version"]) == ("of theirs", "of theirs")
    assert (worker["door"], worker["last_update"]) == ("SGLang's /update_weights_from_disk", {})
    push(server, read(checkpoints / "qwen3"), "a")
    assert server.status()["workers"][0]["version"] == server.weight_version() == "a"


def test_sglangs_own_metrics_tell_of_updates(server: Server, checkpoints: Path) -> None:
    tensors: dict[str, Any] = read(checkpoints / "qwen3-b")
    before = metrics(server)
    push(server, tensors, "step-7")
    after = metrics(server)
    (worker,) = server.status()["workers"]
    (own,) = (value for name, value in after.items() if "weight_load_duration" in name and "ipc" in name)
    assert own > worker["last_update"]["load_seconds"]
    assert after["checkpoint_engine_weights_version"] == 7.0
    assert after["checkpoint_engine_weights_dirty"] == 0.0
    assert after["checkpoint_engine_update_bytes_per_second"] > 0
    brought = after["checkpoint_engine_update_bytes_total"] - before["checkpoint_engine_update_bytes_total"]
    assert brought == sum(tensor.nbytes for tensor in tensors.values())
    counted = 'checkpoint_engine_update_seconds_count{phase="load"}'
    assert after[counted] == before[counted] + 1
    failed = 'checkpoint_engine_update_failures_total{kind="WorkerError",phase="update"}'
    assert before[failed] == 1.0  # the one that was given up
