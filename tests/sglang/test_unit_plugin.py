"""What the SGLang plugin does that needs no SGLang."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint_engine import owned_directory
from checkpoint_engine.client.auto import AutoClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError, SettingError
from checkpoint_engine_sglang import SGLangClient, compat, installation, routes
from checkpoint_engine_sglang.gate import GateMiddleware, ServingGate
from checkpoint_engine_sglang.giving_up import GiveUpFile
from checkpoint_engine_sglang.installation import Hook
from checkpoint_engine_sglang.messages import Order, Report, failures_in, pack, unpack
from checkpoint_engine_sglang.plugin import check_settings

pytestmark = pytest.mark.pure


def ask(gate: ServingGate, path: str, root_path: str = "") -> tuple[int, str]:
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any: ...

    scope = {"type": "http", "path": path, "root_path": root_path}
    asyncio.run(GateMiddleware(app, gate)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


def test_the_gate() -> None:
    gate = ServingGate(waiting=True)
    for path in ("/generate", "/health", "/ping", "/v1/completions", "/a_route_of_the_future", "/update_weights"):
        assert ask(gate, path)[0] == 503
        assert "initial weights" in ask(gate, path)[1]
    for path in (routes.UPDATE, routes.STATUS, "/update_weights_from_ipc", "/model_info", "/continue_generation"):
        assert ask(gate, path)[0] == 200
    assert ask(gate, "/prefix/generate", "/prefix")[0] == 503
    assert ask(gate, "/prefix/model_info", "/prefix")[0] == 200
    gate.note_mixture("worker 1 failed")
    assert "worker 1 failed" in ask(gate, "/generate")[1]
    assert ask(gate, "/continue_generation")[0] == 503
    gate.note_success()
    assert ask(gate, "/generate")[0] == 200
    assert ask(ServingGate(waiting=True, keep_open=("/ping",)), "/ping")[0] == 200


def test_the_gate_says_when_its_time_is_over_and_stays_closed() -> None:
    gate = ServingGate(waiting=True)
    opened: list[bool] = []
    waiting = threading.Thread(target=lambda: opened.append(gate.wait_until_opened(0.3)))
    waiting.start()
    end = time.monotonic() + 10
    while "have not come within" not in gate.closed:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ask(gate, "/generate")[0] == 503
    gate.note_success()
    waiting.join(5)
    assert opened == [True]
    never = ServingGate(waiting=True)
    never.end()
    assert never.wait_until_opened(10) is False


def test_what_travels_in_a_request() -> None:
    handles, order = {"cpu:1": "a", "cpu:0": "b"}, Order(do="update", version="v", timeout=3.0)
    assert unpack(json.loads(json.dumps(pack(handles, order)))) == (handles, order)
    assert list(unpack(pack(handles, order))[0]) == ["cpu:1", "cpu:0"]
    assert unpack(handles) == (handles, None)
    same = [Report(rank, ok=rank == 1, phase="update", error="x") for rank in range(3)]
    assert failures_in(same) == "worker 0, 2 failed in update: x"
    assert failures_in([Report(0)]) == ""


def test_what_a_killed_server_left_goes_with_the_next_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order = GiveUpFile()
    kind = order.path.parent.name.rpartition("-")[0]
    order.close()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(owned_directory, "_swept", set())  # as in the next process
    (tmp_path / f"{kind}-left").mkdir()
    order = GiveUpFile()
    assert list(tmp_path.iterdir()) == [order.path.parent]
    order.close()


def test_places_that_are_not_there() -> None:
    place = Hook("x", ("json.no_such_name", "no.such.module.name", "json.decoder.NaN"), "nothing works")
    (found,) = installation.find_hooks([place])
    assert found.target == ""
    assert "no_such_name" in found.problem
    assert "no.such.module" in found.problem
    assert "NaN: not a function" in found.problem
    (found,) = installation.find_hooks([Hook("x", ("no.such.name", "json.loads"), "")])
    assert (found.target, found.problem) == ("json.loads", "")
    assert installation.version_numbers("0.5.10.post1") == (0, 5, 10)
    assert installation.version_numbers("0.5.10rc1") < (0, 5, 11)
    assert installation.version_numbers("of unknown version") == ()


Answer = tuple[int, object]


@pytest.fixture
def engine() -> Iterator[Callable[..., SGLangClient]]:
    """A client whose server gives prepared answers."""
    servers: list[ThreadingHTTPServer] = []

    def serve(
        answers: dict[str, Answer], asked: list[str] | None = None, keys: list[str] | None = None
    ) -> SGLangClient:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                if asked is not None:
                    asked.append(f"{self.path} {self.rfile.read(length).decode()}".strip())
                if keys is not None:
                    keys.append(self.headers.get("Authorization", ""))
                status, content = answers.get(self.path, (404, {}))
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - the name that the base class looks for

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return SGLangClient(f"http://127.0.0.1:{server.server_port}", timeout=5)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def update(client: SGLangClient, **how: Any) -> None:
    options = {"version": "v", "pause": "keep", "reset_caches": True, "timeout": 10.0}
    client.update_weights({"cpu:0": "handle"}, **{**options, **how})


STATUS = {"workers": [{"rank": 0, "dirty": False, "version": "v"}], "pipeline_stages": 1}
QUIET: dict[str, Answer] = {"/pause_generation": (200, {}), "/continue_generation": (200, {})}


def test_the_client_says_what_a_server_without_the_plugin_lacks(engine: Callable[..., SGLangClient]) -> None:
    with pytest.raises(EngineRequestError, match="install checkpoint-engine-sglang"):
        engine({"/health": (200, {})}).wait_ready(Deadline(5))
    with pytest.raises(DeadlineError, match="503"):
        engine({routes.STATUS: (503, {})}).wait_ready(Deadline(1))
    client = engine({routes.STATUS: (200, STATUS)})
    client.wait_ready(Deadline(5))
    assert client.world_size() == 1


@pytest.mark.parametrize(
    ("pause", "reset_caches", "mode"),
    [("keep", True, "retract"), ("keep", False, "in_place"), ("abort", True, "abort")],
)
def test_the_client_pauses_as_it_is_told(
    engine: Callable[..., SGLangClient], pause: str, reset_caches: bool, mode: str
) -> None:
    asked: list[str] = []
    done = {"results": [{"rank": 0, "ok": True}]}
    client = engine({**QUIET, routes.STATUS: (200, STATUS), routes.UPDATE: (200, done)}, asked)
    update(client, pause=pause, reset_caches=reset_caches)
    bodies = dict(line.partition(" ")[::2] for line in asked if " " in line)
    assert json.loads(bodies["/pause_generation"]) == {"mode": mode}
    sent = json.loads(bodies[routes.UPDATE])
    assert (sent["flush_cache"], sent["wait_for_requests"]) == (reset_caches, False)
    assert sent["handles"] == [["cpu:0", "handle"]]
    assert [line.split()[0] for line in asked][-1] == "/continue_generation"


@pytest.mark.parametrize(("pause", "stages"), [("wait", 1), ("keep", 2)])
def test_the_client_leaves_waiting_to_sglang(engine: Callable[..., SGLangClient], pause: str, stages: int) -> None:
    asked: list[str] = []
    done = {"results": [{"rank": 0, "ok": True}]}
    client = engine({routes.STATUS: (200, {**STATUS, "pipeline_stages": stages}), routes.UPDATE: (200, done)}, asked)
    update(client, pause=pause)
    assert not [line for line in asked if "generation" in line]
    (sent,) = [json.loads(line.partition(" ")[2]) for line in asked if line.startswith(routes.UPDATE)]
    assert sent["wait_for_requests"] is True


@pytest.mark.parametrize("ok", [True, False])
def test_the_client_leaves_a_pause_alone_that_somebody_else_made(engine: Callable[..., SGLangClient], ok: bool) -> None:
    """As whoever pauses all engines, updates them in turn, and then has all of them go on."""
    asked: list[str] = []
    done = {"results": [{"rank": 0, "ok": ok, "phase": "update", "error": "it broke"}]}
    paused = {**STATUS, "paused": True}
    client = engine({**QUIET, routes.STATUS: (200, paused), routes.UPDATE: (200 if ok else 500, done)}, asked)
    with contextlib.nullcontext() if ok else pytest.raises(EngineRequestError, match="as somebody else had it"):
        update(client)
    assert not any(line.startswith("/continue_generation") for line in asked)


@pytest.mark.parametrize("dirty", [True, False])
def test_the_client_resumes_only_what_is_whole(engine: Callable[..., SGLangClient], dirty: bool) -> None:
    asked: list[str] = []
    failed = {"results": [{"rank": 0, "ok": True}, {"rank": 1, "ok": False, "phase": "update", "error": "it broke"}]}
    status = {"workers": [{"rank": 0, "dirty": dirty}], "pipeline_stages": 1}
    client = engine({**QUIET, routes.STATUS: (200, status), routes.UPDATE: (500, failed)}, asked)
    with pytest.raises(EngineRequestError, match=r"worker 1 failed in update: it broke") as caught:
        update(client)
    assert ("mixture" in str(caught.value)) is dirty
    assert any(line.startswith("/continue_generation") for line in asked) is not dirty


def test_the_client_repeats_what_a_server_says_that_refuses_outright(engine: Callable[..., SGLangClient]) -> None:
    refusal = {"ok": False, "error": "another update is under way", "results": []}
    client = engine({**QUIET, routes.STATUS: (200, STATUS), routes.UPDATE: (500, refusal)})
    with pytest.raises(EngineRequestError, match="another update is under way"):
        update(client)


def test_without_its_hooks_no_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoint_engine_sglang import front

    monkeypatch.setitem(front.lost_hooks, "workers", "workers cannot be updated (no such place)")
    manager = SimpleNamespace(initial_weights_loaded=True)  # asking the workers would need far more of it
    fronted = front.ServerFront(manager)
    reports, problem = asyncio.run(fronted.update(SimpleNamespace(zmq_handles={}), wait_for_requests=True))
    assert reports == []
    assert "no such place" in problem
    with pytest.raises(EngineRequestError, match="no such place"):
        asyncio.run(fronted.status())


def test_the_client_sends_a_key_and_says_when_it_is_asked_for_one(
    engine: Callable[..., SGLangClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: dict[str, Answer] = {routes.STATUS: (401, {"error": "Unauthorized"}), "/model_info": (401, {})}
    client = engine(refused)
    with pytest.raises(EngineRequestError, match=r"asks for a key; set CHECKPOINT_ENGINE_API_KEY"):
        client.wait_ready(Deadline(5))
    with pytest.raises(EngineRequestError, match=r"asks for a key; set CHECKPOINT_ENGINE_API_KEY"):
        AutoClient(client.endpoint.address).wait_ready(Deadline(5))
    with pytest.raises(EngineRequestError, match="does not take the key that it is given"):
        SGLangClient(client.endpoint.address, api_key="wrong").wait_ready(Deadline(5))
    keys: list[str] = []
    client = engine({routes.STATUS: (200, STATUS)}, keys=keys)
    monkeypatch.setenv("CHECKPOINT_ENGINE_API_KEY", "from the environment")
    client.wait_ready(Deadline(5))
    SGLangClient(client.endpoint.address).wait_ready(Deadline(5))
    SGLangClient(client.endpoint.address, api_key="an option").wait_ready(Deadline(5))
    assert keys == ["", "Bearer from the environment", "Bearer an option"]


@pytest.mark.parametrize("setting", [{"grpc_port": 5}, {"smg_grpc_mode": True}, {"tokenizer_worker_num": 2}, {}])
def test_it_does_not_start_where_it_could_not_be_kept_closed(setting: dict[str, Any]) -> None:
    arguments = SimpleNamespace(checkpoint_engine_wait_weights_before_ready=True, **setting)
    if setting:
        option = f"--{next(iter(setting)).replace('_', '-')}"
        with pytest.raises(SettingError, match=f"--wait-for-initial-weights with {option}"):
            check_settings(lambda _: None, arguments)
    else:
        check_settings(lambda _: None, arguments)
    check_settings(lambda _: None, SimpleNamespace(**setting))


def test_a_grpc_port_on_which_nothing_listens_is_no_reason() -> None:
    """SGLang up to 0.5.14 always chooses one, and starts that server only when its environment asks for it."""
    arguments = SimpleNamespace(checkpoint_engine_wait_weights_before_ready=True, grpc_port=40000, enable_grpc=False)
    check_settings(lambda _: None, arguments)
    arguments.grpc_mode = True
    with pytest.raises(SettingError, match="with --grpc-mode"):
        check_settings(lambda _: None, arguments)
    arguments.grpc_mode, arguments.enable_grpc = False, True
    with pytest.raises(SettingError, match="with SGLANG_ENABLE_GRPC"):
        check_settings(lambda _: None, arguments)


class OldScheduler:
    """Stands in for a scheduler before 0.5.22, which flushes its cache only while nothing waits."""

    def __init__(self, *requests: SimpleNamespace, paused: bool) -> None:
        self.running_batch, self._engine_paused, self.waiting_queue = (), paused, list(requests)

    def is_fully_idle(self, for_health_check: bool = False) -> bool:
        return not self.waiting_queue and not for_health_check


RETRACTED, HOLDS_CACHE = SimpleNamespace(req_pool_idx=None), SimpleNamespace(req_pool_idx=3)
RETRACTED_IN_0_5_20, HOLDS_CACHE_IN_0_5_20 = SimpleNamespace(kv=RETRACTED), SimpleNamespace(kv=HOLDS_CACHE)
UNKNOWN = SimpleNamespace()


@pytest.mark.parametrize(
    ("requests", "paused", "can_flush"),
    [
        ((RETRACTED,), True, True),
        ((RETRACTED,), False, False),
        ((RETRACTED, HOLDS_CACHE), True, False),
        ((RETRACTED_IN_0_5_20,), True, True),
        ((HOLDS_CACHE_IN_0_5_20,), True, False),
        ((UNKNOWN,), True, False),
    ],
)
def test_an_old_scheduler_flushes_while_retracted_requests_wait(
    requests: tuple[SimpleNamespace, ...], paused: bool, can_flush: bool
) -> None:
    scheduler = OldScheduler(*requests, paused=paused)
    assert compat.cannot_flush(scheduler) is not can_flush
    with compat.retracted_set_aside(scheduler):
        assert scheduler.is_fully_idle() is can_flush
    assert tuple(scheduler.waiting_queue) == requests
