"""Our own routes in vLLM's server: who may use them, and what they answer; the engine behind them is a stand-in."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY

from checkpoint_engine_vllm.routes import PREFIX, Routes

STATUS = f"{PREFIX}/status"


class Engine:
    """Answers as vLLM's `EngineClient` does, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = (), **_: Any) -> list[Any]:
        self.asked.append((method, *args))
        if method == "checkpoint_engine_update" and args[1] == "broken":
            raise RuntimeError("the engine is dead")
        return [{"ok": True, "dirty": False}]

    async def is_paused(self) -> bool:
        return False

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.asked.append(("pause", mode, clear_cache))

    async def resume_generation(self) -> None:
        self.asked.append("resume")

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        return reset_running_requests

    async def reset_mm_cache(self) -> None: ...

    async def reset_encoder_cache(self) -> None: ...


class Asking:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: str = "127.0.0.1", **set_up: Any) -> None:
        for name in ("VLLM_API_KEY", "CHECKPOINT_ENGINE_TOKEN"):
            monkeypatch.delenv(name, raising=False)
            if name in set_up:
                monkeypatch.setenv(name, set_up[name])
        self.engine, routes, app = Engine(), Routes(), FastAPI()
        routes.attach_router(app)
        engine = None if set_up.get("without_engine") else self.engine
        anyio.run(routes.init_state, engine, app.state, Namespace(api_key=set_up.get("api_key")))
        self.transport = httpx.ASGITransport(app=app, client=(host, 1234))

    def send(self, method: str, path: str, **what: Any) -> httpx.Response:
        async def sent() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://vllm") as client:
                return await client.request(method, path, **what)

        return anyio.run(sent)

    def status(self, **headers: str) -> int:
        return self.send("GET", STATUS, headers=headers).status_code

    def post(self, name: str, **body: Any) -> tuple[int, Any]:
        reply = self.send("POST", f"{PREFIX}/{name}", json=body)
        return reply.status_code, reply.json()


@pytest.mark.parametrize(
    "set_up",
    [
        {"api_key": ["other", "right"], "CHECKPOINT_ENGINE_TOKEN": "wrong"},
        {"api_key": "right"},
        {"VLLM_API_KEY": "right"},
        {"CHECKPOINT_ENGINE_TOKEN": "right"},
    ],
    ids=["several keys", "a key", "a key of the environment", "a token"],
)
def test_a_key_or_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch, set_up: dict[str, Any]) -> None:
    asking = Asking(monkeypatch, **set_up)
    assert asking.status(Authorization="Bearer right") == 200
    assert asking.status(Authorization="Bearer wrong") == asking.status() == asking.status(Authorization="right") == 401
    assert Asking(monkeypatch, host="10.1.2.3", **set_up).status(Authorization="Bearer right") == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_without_a_key_this_host_may_ask(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    asking = Asking(monkeypatch, host=host)
    assert asking.status() == 200
    assert asking.status(Origin="http://evil.example") == asking.status(**{"X-Forwarded-For": "10.1.2.3"}) == 403


@pytest.mark.parametrize("host", ["10.1.2.3", "testclient"])
def test_without_a_key_nobody_else_may(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    assert Asking(monkeypatch, host=host).status() == 403


def test_what_they_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(monkeypatch)
    assert asking.send("GET", STATUS).json() == {
        "workers": [{"ok": True, "dirty": False}],
        "world_size": 2,
        "paused": False,
        "weight_version": None,
        "adapters": {},
    }
    assert asking.post("update", handles={"cpu:0": "h"}, version="v2", timeout=5) == (
        200,
        {"results": [{"ok": True, "dirty": False}]},
    )
    assert asking.engine.asked[-1] == ("checkpoint_engine_update", {"cpu:0": "h"}, "v2", 5)
    asking.post("pause", mode="wait", clear_cache=False)
    asking.post("resume")
    assert asking.engine.asked[-2:] == [("pause", "wait", False), "resume"]
    assert asking.post("reset_caches") == (200, {"success": True})
    asking.post("abort")
    assert asking.engine.asked[-1] == ("checkpoint_engine_abort",)


def test_the_workers_of_all_replicas_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(*given: object, engine: str) -> list[Any]:
        method, name, seconds, arguments, named = given
        assert (method, name, arguments, named) == ("collective_rpc", "checkpoint_engine_status", (), None)
        assert seconds
        return [{"replica": engine, "worker": worker} for worker in (0, 1)]

    asking = Asking(monkeypatch)
    core: Any = SimpleNamespace(core_engines=["first", "second"], _call_utility_async=call)
    monkeypatch.setattr(asking.engine, "engine_core", core, raising=False)
    workers = asking.send("GET", STATUS).json()["workers"]
    assert workers == [{"replica": replica, "worker": worker} for replica in ("first", "second") for worker in (0, 1)]


def test_an_update_of_which_no_worker_tells_is_counted_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failures(kind: str) -> float:
        labels = {"kind": kind, "phase": "update"}
        return REGISTRY.get_sample_value("checkpoint_engine_update_failures_total", labels) or 0.0

    asking, before = Asking(monkeypatch), failures("RuntimeError")
    assert asking.post("update", handles={"cpu:0": "h"}, version="broken")[0] == 500
    assert failures("RuntimeError") == before + 1
    assert asking.post("update", version="without handles")[0] == 400  # nobody was asked
    assert (failures("RuntimeError"), failures("RefusedError")) == (before + 1, 0)


def test_what_they_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(monkeypatch)
    assert asking.post("update", version="v2")[0] == 400
    assert asking.post("update", handles=["h"])[0] == 400
    assert asking.post("weight_version", version="v2")[0] == 404
    adapter = asking.send("POST", f"{PREFIX}/adapter", json={"name": "math", "directory": "/nowhere"})
    assert (adapter.status_code, "--enable-lora" in adapter.json()["error"]) == (400, True)
    status, answer = asking.post("update", handles={"cpu:0": "h"}, version="broken")
    assert (status, answer["error"]) == (500, "RuntimeError: the engine is dead")
    assert Asking(monkeypatch, without_engine=True).post("resume") == (404, {"error": "this server has no engine"})
