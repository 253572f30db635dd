"""`VllmClient` against a stand-in for vLLM's routes: versions and set-ups that no server here can show."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from checkpoint_engine.cli.options import Engines
from checkpoint_engine.client.auto import load_client
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    EngineRequestError,
    MissingDependencyError,
    SettingError,
)
from checkpoint_engine_vllm import LlmClient, VllmClient, WorkerExtension, beside, compat, plugin
from checkpoint_engine_vllm.extension import give_methods

OK = {"ok": True, "dirty": False, "version": "v2", "error": "", "phase": "", "seconds": 0.1}
STATUS = {"dirty": False, "version": "v1", "updating": False}
Answer = tuple[int, Any]


class StandIn:
    """Answers by route; a route that is not listed is 404. `asked` are the requests, in order."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[Any], Answer]] = {"/health": lambda _: (200, "")}
        self.methods: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.called: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                self.answer(json.loads(self.rfile.read(length) or "null"))

            def answer(self, body: Any) -> None:
                outer.asked.append(self.path)
                route = outer.routes.get(self.path.partition("?")[0])
                status, reply = (404, {"detail": "Not Found"}) if route is None else route(body)
                raw = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.client = VllmClient(f"http://127.0.0.1:{self.server.server_port}", timeout=5)

    def with_rpc(self, **methods: Answer) -> StandIn:
        missing = (500, {"error": {"message": "Worker failed with error: no such attribute"}})
        self.methods = {"check_health": (200, {"results": [None]}), **methods}

        def call(body: Any) -> Answer:
            self.called.append(body["method"])
            return self.methods.get(body["method"], missing)

        self.routes["/collective_rpc"] = call
        return self

    def with_routes(self, *paths: str) -> StandIn:
        for path in paths:
            self.routes[path] = lambda _: (200, {"success": True})
        return self

    def update(self, pause: Any = "keep", *, reset_caches: bool = True) -> None:
        self.client.update_weights({"cpu:0": "h"}, version="v2", pause=pause, reset_caches=reset_caches, timeout=10)


@pytest.fixture
def vllm() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


def results(*reports: dict[str, Any]) -> Answer:
    return 200, {"results": list(reports)}


def test_the_client_is_found_by_its_name() -> None:
    assert load_client("vllm") is VllmClient


def test_an_engine_without_the_development_routes_is_told_how_to_start(vllm: StandIn) -> None:
    with pytest.raises(EngineRequestError, match="VLLM_SERVER_DEV_MODE=1"):
        vllm.client.wait_ready(Deadline(5))
    with pytest.raises(EngineRequestError, match="VLLM_SERVER_DEV_MODE=1"):
        vllm.update()


def test_an_engine_without_our_methods_is_told_how_to_get_them(vllm: StandIn) -> None:
    vllm.with_rpc()
    with pytest.raises(EngineRequestError, match=r"--worker-extension-cls checkpoint_engine_vllm\.WorkerExtension"):
        vllm.client.wait_ready(Deadline(5))


def test_workers_without_our_methods_are_reached_by_vllms_weight_transfer(vllm: StandIn) -> None:
    calls = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")
    vllm.with_rpc().with_routes("/pause", "/resume", *RESETS, "/update_weight_version", *calls)
    vllm.client.wait_ready(Deadline(5))
    vllm.update()
    assert [path for path in vllm.asked if path in calls] == list(calls)
    vllm.routes["/update_weights"] = lambda _: (500, {"error": "no such weights"})
    vllm.asked.clear()
    with pytest.raises(EngineRequestError, match=r"no such weights.* is unknown .* it was left paused"):
        vllm.update()
    assert "/resume" not in vllm.asked


def test_our_own_routes_are_the_best_way_in(vllm: StandIn) -> None:
    own = "/v1/checkpoint_engine"
    vllm.with_routes(own, *(f"{own}/{name}" for name in ("pause", "resume", "reset_caches", "weight_version")))
    for name in ("update", "verify"):
        vllm.routes[f"{own}/{name}"] = lambda body: results({**OK, "version": body["version"]})
    vllm.routes[f"{own}/status"] = lambda _: (200, {"workers": [STATUS], "world_size": 1})
    vllm.client.wait_ready(Deadline(5))
    assert vllm.client.world_size() == 1
    vllm.asked.clear()
    vllm.update("wait")
    names = ("pause", "reset_caches", "resume", "status", "status", "update", "weight_version")
    assert sorted(vllm.asked) == ["/is_paused", *(f"{own}/{name}" for name in names)]
    vllm.client.verify_weights({"cpu:0": "h"}, version="v2", timeout=10)
    assert vllm.asked[-1] == f"{own}/verify"


def test_without_development_mode_the_pause_of_somebody_else_is_seen(vllm: StandIn) -> None:
    own = "/v1/checkpoint_engine"
    vllm.with_routes(own, *(f"{own}/{name}" for name in ("pause", "resume", "reset_caches", "weight_version")))
    vllm.routes[f"{own}/update"] = lambda _: results(OK)
    vllm.routes[f"{own}/status"] = lambda _: (200, {"workers": [STATUS], "world_size": 1, "paused": True})
    vllm.update("keep")
    assert f"{own}/resume" not in vllm.asked


def test_our_own_routes_say_why_they_refuse(vllm: StandIn) -> None:
    vllm.routes["/v1/checkpoint_engine"] = lambda _: (403, {"error": "no key is set"})
    with pytest.raises(EngineRequestError, match="no key is set"):
        vllm.client.wait_ready(Deadline(5))


def test_an_engine_that_is_broken_gets_no_advice_on_its_set_up(vllm: StandIn) -> None:
    vllm.with_rpc(check_health=(500, "the engine is dead"))
    with pytest.raises(EngineRequestError) as raised:
        vllm.client.wait_ready(Deadline(5))
    assert "worker-extension" not in str(raised.value)


RESETS = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


def test_the_order_of_an_update(vllm: StandIn) -> None:
    vllm.with_rpc(checkpoint_engine_status=results(STATUS), checkpoint_engine_update=results(OK)).with_routes(
        "/pause", "/resume", *RESETS, "/update_weight_version"
    )
    vllm.update("wait")
    resets = [f"{RESETS[0]}?reset_running_requests=true", *RESETS[1:]]
    assert vllm.called == ["checkpoint_engine_status", "checkpoint_engine_update"]
    vllm.asked.remove("/collective_rpc")  # whether the workers hear is asked beside all that follows
    assert vllm.asked[:3] == ["/v1/checkpoint_engine", "/is_paused", "/version"]
    described, paused, *under_way, published, resumed = vllm.asked[3:]
    assert (described, paused) == ("/openapi.json", "/pause?mode=wait&clear_cache=true")
    assert sorted(under_way) == sorted(["/collective_rpc", *resets])
    assert (published, resumed) == ("/update_weight_version", "/resume")


def test_caches_of_a_paused_engine_are_reset_while_it_is_updated(vllm: StandIn) -> None:
    vllm.with_rpc().with_routes("/pause", "/resume", *RESETS)

    def update_once_all_are_reset(_: object) -> Answer:
        until = time.monotonic() + 5
        while not set(RESETS) <= {path.partition("?")[0] for path in vllm.asked} and time.monotonic() < until:
            time.sleep(0.01)
        return results(OK if time.monotonic() < until else {**OK, "ok": False, "error": "no reset came"})

    vllm.routes["/collective_rpc"] = update_once_all_are_reset
    vllm.update("keep")
    assert vllm.asked[-1] == "/resume"


def test_caches_of_an_engine_that_serves_on_are_reset_after_the_update(vllm: StandIn) -> None:
    vllm.with_rpc(checkpoint_engine_update=results(OK)).with_routes(*RESETS)
    vllm.update("none")
    assert vllm.asked[:2] == ["/v1/checkpoint_engine", "/collective_rpc"]


def test_a_reset_that_fails_beside_the_update_is_told(vllm: StandIn) -> None:
    vllm.with_rpc(checkpoint_engine_update=results(OK)).with_routes("/pause", "/resume", *RESETS)
    vllm.routes[RESETS[1]] = lambda _: (500, "no cache left")
    with pytest.raises(
        EngineRequestError, match="no cache left; all workers hold version 'v2' and may still be paused"
    ):
        vllm.update("keep")
    assert "/resume" not in vllm.asked


def test_how_to_pause_is_looked_up_once_for_each_version(vllm: StandIn) -> None:
    old_pause(vllm)
    for version, waits in (("0.10", True), ("0.10", True), ("0.21", False)):
        vllm.routes["/version"] = lambda _, version=version: (200, {"version": version})
        if not waits:
            parameters = [{"name": "mode"}, {"name": "clear_cache"}]
            described = {"paths": {"/pause": {"post": {"parameters": parameters}}}}
            vllm.routes["/openapi.json"] = lambda _, described=described: (200, described)
        vllm.asked.clear()
        vllm.update("wait")
        assert any("wait_for_inflight_requests=true" in path for path in vllm.asked) == waits
    assert "/openapi.json" in vllm.asked
    vllm.asked.clear()
    vllm.update("keep")
    assert "/openapi.json" not in vllm.asked


def test_a_vllm_whose_version_says_how_it_pauses_need_not_describe_itself(vllm: StandIn) -> None:
    old_pause(vllm).routes["/version"] = lambda _: (200, {"version": "0.26.0rc1+cpu"})
    vllm.update("keep")
    assert "/openapi.json" not in vllm.asked


def test_caches_are_kept_when_asked_to(vllm: StandIn) -> None:
    vllm.with_rpc(checkpoint_engine_update=results(OK)).with_routes("/pause", "/resume")
    vllm.update("keep", reset_caches=False)
    assert "/pause?mode=keep&clear_cache=false" in vllm.asked
    assert not [path for path in vllm.asked if path.startswith("/reset")]


def test_a_cache_that_this_vllm_does_not_have_is_passed_over_but_said(
    vllm: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.with_rpc(checkpoint_engine_update=results(OK)).with_routes("/pause", "/resume", "/reset_prefix_cache")
    with caplog.at_level(logging.WARNING):
        vllm.update()
    assert "/reset_encoder_cache" in caplog.text


def test_a_prefix_cache_that_stays_in_use_is_an_error(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.limits.KNOCK", 0.2)
    vllm.with_rpc(checkpoint_engine_update=results(OK)).with_routes("/pause", "/resume")
    vllm.routes["/reset_prefix_cache"] = lambda _: (200, {"success": False})
    with pytest.raises(EngineRequestError, match="prefix cache"):
        vllm.update("none")


def old_pause(vllm: StandIn) -> StandIn:
    parameters = [{"name": "wait_for_inflight_requests"}, {"name": "clear_cache"}]
    vllm.routes["/openapi.json"] = lambda _: (200, {"paths": {"/pause": {"post": {"parameters": parameters}}}})
    return vllm.with_rpc(checkpoint_engine_update=results(OK)).with_routes("/pause", "/resume", "/reset_prefix_cache")


def test_a_vllm_whose_pause_knows_no_modes_waits_or_aborts(vllm: StandIn) -> None:
    old_pause(vllm).update("wait")
    assert any("wait_for_inflight_requests=true" in path for path in vllm.asked)


def test_a_vllm_whose_pause_knows_no_modes_cannot_keep(vllm: StandIn) -> None:
    with pytest.raises(EngineRequestError, match="cannot keep running requests"):
        old_pause(vllm).update("keep")
    assert "checkpoint_engine_update" not in vllm.called


@pytest.mark.parametrize(("dirty", "resumed"), [(False, True), (True, False)])
def test_after_a_failure_it_serves_again_only_with_whole_weights(vllm: StandIn, dirty: bool, resumed: bool) -> None:
    failed = {**OK, "ok": False, "dirty": dirty, "error": "WorkerError: broken"}
    status = results({**STATUS, "dirty": dirty})
    vllm.with_rpc(checkpoint_engine_update=results(failed), checkpoint_engine_status=status)
    vllm.with_routes("/pause", "/resume")
    with pytest.raises(EngineRequestError, match="WorkerError: broken"):
        vllm.update()
    assert ("/resume" in vllm.asked) == resumed


def test_an_engine_that_tells_of_one_replica_alone_stays_paused_after_a_failure(vllm: StandIn) -> None:
    """As vLLM's development routes do with several data-parallel replicas."""
    vllm.with_rpc(checkpoint_engine_update=(500, "a worker is gone"), checkpoint_engine_status=results(STATUS))
    vllm.with_routes("/pause", "/resume")
    vllm.routes["/get_world_size"] = lambda _: (200, {"world_size": 2})
    with pytest.raises(EngineRequestError, match="what 1 of its 2 workers hold"):
        vllm.update()
    assert "/resume" not in vllm.asked


def with_replicas(vllm: StandIn, *, behind_it: int = 2) -> StandIn:
    """As vLLM with two replicas of experts answers, one of whose workers waits for the other in each step."""
    status = {**STATUS, "in_step": 2, "replicas": behind_it}
    vllm.with_rpc(checkpoint_engine_status=results(status), checkpoint_engine_update=results(OK))
    vllm.with_routes("/pause", "/resume", *RESETS, "/update_weight_version")
    vllm.routes["/is_paused"] = lambda _: (200, {"is_paused": paused(vllm)})
    return vllm


def paused(vllm: StandIn) -> bool:
    stops = [path for path in vllm.asked if path.startswith("/pause") or path == "/resume"]
    return bool(stops) and stops[-1] != "/resume"


def test_replicas_that_step_together_are_not_updated_while_they_step(vllm: StandIn) -> None:
    with pytest.raises(EngineRequestError, match=r"take each step together.*use pause mode keep.*still holds its old"):
        with_replicas(vllm).update("none")
    assert "checkpoint_engine_update" not in vllm.called
    vllm.update("keep")
    vllm.asked.append("/pause")  # by whoever drives this engine, as frameworks do
    vllm.update("none")
    assert vllm.called.count("checkpoint_engine_update") == 2
    assert paused(vllm)


def test_replicas_that_step_together_are_paused_while_they_are_compared(vllm: StandIn) -> None:
    compared: list[bool] = []

    def compare() -> None:
        vllm.client.verify_weights({"cpu:0": "h"}, version="v2", timeout=10)

    def note(found: dict[str, Any]) -> Callable[[Any], Answer]:
        def answer(body: Any) -> Answer:
            if body["method"] == "checkpoint_engine_status":
                return vllm.methods["checkpoint_engine_status"]
            compared.append(paused(vllm))
            return results(found)

        return answer

    with_replicas(vllm).routes["/collective_rpc"] = note({**OK, "verified": True})
    compare()
    assert (compared, paused(vllm)) == ([True], False)
    vllm.routes["/collective_rpc"] = note({**OK, "ok": False, "error": "WorkerError: broken"})
    with pytest.raises(EngineRequestError, match="WorkerError: broken"):
        compare()
    assert (compared, paused(vllm)) == ([True, True], False)
    vllm.asked.append("/pause")
    with pytest.raises(EngineRequestError, match="WorkerError: broken"):
        compare()
    assert paused(vllm)


def test_replicas_behind_several_endpoints_are_not_resumed_one_by_one(vllm: StandIn) -> None:
    """VLLM would keep the one that is resumed from doing anything until the others are, too."""
    with_replicas(vllm, behind_it=1).methods["checkpoint_engine_update"] = (500, "a worker is gone")
    with pytest.raises(EngineRequestError, match=r"still holds its old weights.* could not be resumed: update again"):
        vllm.update("keep")
    assert paused(vllm)
    vllm.methods["checkpoint_engine_update"] = results(OK)
    vllm.update("keep")
    assert not paused(vllm)


def test_all_endpoints_whose_replicas_step_together_must_be_named(vllm: StandIn) -> None:
    with_replicas(vllm, behind_it=1).routes["/get_world_size"] = lambda _: (200, {"world_size": 1})
    here = vllm.client.endpoint.address
    with pytest.raises(SettingError, match=r"behind 2 endpoints.*\(1 given\)"):
        Engines("vllm", (here,)).knock(print)
    Engines("vllm", (here, here)).knock(print)


def test_a_comparison_does_not_pass_for_an_update(vllm: StandIn) -> None:
    """As when the parameter server was asked for `reload="verify"` and its client for an update."""
    compared = results({**OK, "version": "v1", "verified": True})
    vllm.with_rpc(checkpoint_engine_update=compared, checkpoint_engine_status=results(STATUS))
    vllm.with_routes("/pause", "/resume", "/update_weight_version")
    with pytest.raises(EngineRequestError, match=r"only had it compare.* still holds its old weights"):
        vllm.update()
    assert "/update_weight_version" not in vllm.asked
    assert "/resume" in vllm.asked  # maybe not last: caches are reset beside it
    vllm.client.verify_weights({"cpu:0": "h"}, version="v2", timeout=10)


def stand_in_for_vllm(monkeypatch: pytest.MonkeyPatch, worker: str, extension: str) -> type:
    class EngineArgs:
        def create_engine_config(self) -> SimpleNamespace:
            return SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker, worker_extension_cls=extension))

    module = ModuleType("vllm.engine.arg_utils")
    module.EngineArgs = EngineArgs  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("vllm", "vllm.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EngineArgs


@pytest.mark.parametrize(
    ("worker", "extension", "used"),
    [
        ("vllm.v1.worker.gpu_worker.Worker", "", plugin.WORKER_EXTENSION),
        ("vllm.v1.worker.gpu_worker.Worker", "my.own.Extension", "checkpoint_engine_vllm.beside.my:own:Extension"),
        ("vllm.v1.worker.gpu_worker.Worker", plugin.WORKER_EXTENSION, plugin.WORKER_EXTENSION),
        ("somewhere.else.Worker", "", ""),
    ],
)
def test_workers_get_our_methods_beside_others(
    monkeypatch: pytest.MonkeyPatch, worker: str, extension: str, used: str
) -> None:
    arguments = stand_in_for_vllm(monkeypatch, worker, extension)
    plugin.register()
    once = arguments.create_engine_config
    plugin.register()
    assert arguments.create_engine_config is once
    assert arguments().create_engine_config().parallel_config.worker_extension_cls == used


class Other:
    """An extension of somebody else."""

    def theirs(self) -> str:
        return "theirs"

    def update_weights_from_ipc(self) -> str:
        return "theirs"


def test_a_class_beside_another_one_has_the_methods_of_both(caplog: pytest.LogCaptureFixture) -> None:
    named = beside.name_beside(f"{__name__}.Other")
    module, _, kind = named.rpartition(".")
    with caplog.at_level(logging.WARNING, logger="vllm"):
        both = getattr(importlib.import_module(module), kind)
    assert both is getattr(beside, kind)
    assert both().theirs() == both().update_weights_from_ipc() == "theirs"
    assert both.checkpoint_engine_status is WorkerExtension.checkpoint_engine_status
    assert "update_weights_from_ipc" in caplog.text
    assert getattr(both, beside.BESIDE) == f"{__name__}.Other"
    with pytest.raises(AttributeError):
        _ = beside.nothing


def test_a_worker_of_somebody_elses_class_gets_what_it_lacks() -> None:
    worker: Any = Other()
    give_methods(worker)
    assert worker.update_weights_from_ipc() == "theirs"
    assert worker.checkpoint_engine_status.__func__ is WorkerExtension.checkpoint_engine_status
    assert not hasattr(Other(), "checkpoint_engine_status")


def test_the_plugin_does_not_stop_an_unknown_vllm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert plugin.WORKER_EXTENSION in caplog.text


def test_a_vllm_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_vllm(monkeypatch, "", "")
    sys.modules["vllm"].__version__ = "0.15.1"  # pyright: ignore[reportAttributeAccessIssue]
    compat.layerwise.cache_clear()
    compat.version.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match=r"vLLM 0\.15\.1 .* needs vLLM 0\.16"):
            compat.layerwise()
    finally:
        compat.version.cache_clear()
    assert issubclass(MissingDependencyError, CheckpointEngineError)


class OldLlm:
    """An offline `LLM` as it was before it could be paused, or had a version of its weights."""

    def __init__(self, results: Any) -> None:
        self.results, self.called = results, list[str]()
        parallel = SimpleNamespace(world_size=1)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))

    def collective_rpc(self, method: str, timeout: float, args: tuple[object, ...]) -> Any:
        del timeout, args
        self.called.append(method)
        if isinstance(self.results, Exception):
            raise self.results
        return [STATUS if method == "checkpoint_engine_status" else self.results]

    def sleep(self, level: int = 1) -> None:
        raise AssertionError(f"its memory was to be taken: {level}")

    def reset_prefix_cache(self) -> bool:
        self.called.append("reset_prefix_cache")
        return True


def test_an_old_llm_is_updated_between_two_of_its_steps() -> None:
    llm = OldLlm(OK)
    LlmClient(llm).update_weights({"d": "h"}, version="v2", pause="keep", reset_caches=True, timeout=5)
    assert llm.called == ["checkpoint_engine_status", "checkpoint_engine_update", "reset_prefix_cache"]


def test_what_an_llm_raises_is_said_in_our_words() -> None:
    for raised, kind, words in (
        (NotImplementedError("no such method"), EngineRequestError, "NotImplementedError: no such method.*lack our"),
        (TimeoutError(), DeadlineError, "not through with collective_rpc"),
    ):
        with pytest.raises(kind, match=words):
            LlmClient(OldLlm(raised)).wait_ready(Deadline(5))
