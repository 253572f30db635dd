"""What the SGLang plugin does that needs no SGLang."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.engine.auto import AutoClient
from checkpoint_engine.errors import DeadlineError, EngineRequestError, WeightsRejectedError
from checkpoint_engine_sglang import SGLangClient, places, routes
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.gate import Gate, GateMiddleware
from checkpoint_engine_sglang.load import Load
from checkpoint_engine_sglang.messages import Order, Report, describe_failures, pack, unpack
from checkpoint_engine_sglang.places import Place
from checkpoint_engine_sglang.plans import Plans
from checkpoint_engine_sglang.trial import Trial, try_out

Weights = Iterable[tuple[str, torch.Tensor]]


class Model(nn.Module):
    """Loads as SGLang's models do: fused, sharded (this is rank 0 of two), scalars by value, and joined tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.zeros(4, 6))
        self.fused = nn.Parameter(torch.zeros(8, 6))
        self.shard = nn.Parameter(torch.zeros(3, 6))
        self.scale = nn.Parameter(torch.zeros(1))
        self.joined = nn.Parameter(torch.zeros(4))
        self.calls: list[list[str]] = []

    def load_weights(self, weights: Weights) -> None:
        halves: dict[str, torch.Tensor] = {}
        self.calls.append([])
        for name, tensor in weights:
            self.calls[-1].append(name)
            if name == "plain":
                assert tensor.shape == self.plain.shape, "shapes differ"
                self.plain.data.copy_(tensor)
            elif name in ("fused.0", "fused.1"):
                self.fused.data.narrow(0, 4 * int(name[-1]), 4).copy_(tensor)
            elif name == "shard":
                self.shard.data.copy_(tensor.narrow(0, 0, 3))
            elif name == "scale":
                self.scale.data.fill_(tensor.item())
            elif name.startswith("half"):
                halves[name] = tensor
                if len(halves) == 2:
                    self.joined.data.copy_(torch.cat([halves["half.0"], halves["half.1"]]))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"plain": (4, 6), "fused.0": (4, 6), "fused.1": (4, 6), "shard": (6, 6), "scale": (1,)}
    shapes |= {"half.0": (2,), "half.1": (2,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def specs(given: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}


def runner(model: nn.Module, **config: Any) -> Runner:
    return Runner("target", model, SimpleNamespace(hf_config=SimpleNamespace(**config)), torch.device("cpu"))


def trial_of(model: nn.Module, given: dict[str, torch.Tensor]) -> Trial:
    trial = try_out(runner(model), specs(given))
    assert trial is not None
    return trial


def test_a_trial_sees_everything_and_changes_nothing() -> None:
    model, given = Model(), tensors()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trial = trial_of(model, given)
    assert trial.placed == given.keys()
    assert trial.missing(runner(model), frozenset(), quantised=False) == []
    assert trial.too_large(specs(given), 2) == []
    assert trial.recording.joined == dict.fromkeys(("half.0", "half.1"), frozenset({"half.0", "half.1"}))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_trial_names_what_does_not_fit() -> None:
    model = Model()
    given = tensors()
    del given["fused.1"], given["plain"]
    given["nonsense"] = torch.ones(1)
    given["shard"] = torch.ones(9, 6)
    trial = trial_of(model, given)
    assert trial.unplaced(specs(given), runner(model)) == {"nonsense"}
    missing = trial.missing(runner(model), frozenset(), quantised=False)
    assert missing == ["plain (nothing)", "fused (24 of 48 elements, from fused.0)"]
    assert trial.too_large(specs(given), 2) == ["shard (shape [9, 6], 18 elements taken)"]
    for name, shape in (("plain", (4, 7)), ("fused.0", (1, 6))):
        with pytest.raises(WeightsRejectedError, match=name):
            try_out(runner(Model()), specs({**tensors(), name: torch.ones(shape)}))


def test_tensors_that_checkpoints_may_have_for_nothing() -> None:
    trial = trial_of(Model(), tensors())
    spare = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
        "model.layers.2.x.weight",
        "mtp.fc.weight",
    ]
    needed = ["model.layers.1.x.weight", "other.weight"]
    given = specs(dict.fromkeys([*spare, *needed], torch.ones(1)))
    model = runner(Model(), num_hidden_layers=2, tie_word_embeddings=True)
    assert trial.unplaced(given, model) == set(needed)
    assert "lm_head.weight" in trial.unplaced(given, runner(Model(), tie_word_embeddings=False))


def test_a_loader_that_cannot_be_tried_is_let_through_and_its_model_stays_whole() -> None:
    class Reads(Model):
        def load_weights(self, weights: Weights) -> None:
            for _, tensor in weights:
                if tensor.sum() > 0:
                    raise AssertionError

    class Replaces(Model):
        def load_weights(self, weights: Weights) -> None:
            for _, tensor in weights:
                self.plain.data = tensor
                self.fused = nn.Parameter(tensor, requires_grad=False)

    for kind in (Reads, Replaces):
        model = kind()
        parameters = dict(model.named_parameters())
        assert try_out(runner(model), specs({"plain": torch.ones(4, 6)})) is None
        assert dict(model.named_parameters()).keys() == parameters.keys()
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert not parameter.is_meta


def test_tensors_that_are_joined_reach_the_loader_together_whatever_the_buckets() -> None:
    model, given = Model(), tensors()
    load = Load(Plans().of(runner(model), specs(given)), {name: name for name in given}, planned=False)
    model.calls.clear()
    for name, tensor in given.items():
        passing = tensor.clone()
        load.take([(name, passing), ("of another model", torch.ones(1))])
        passing.zero_()  # the bucket's memory is used again
    assert ["half.0", "half.1"] in [sorted(call) for call in model.calls]
    assert torch.equal(model.joined.data, torch.cat([given["half.0"], given["half.1"]]))
    assert torch.equal(model.shard.data, given["shard"][:3])
    assert model.scale.item() == given["scale"].item()


def ask(gate: Gate, path: str, root_path: str = "") -> tuple[int, str]:
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
    gate = Gate(waiting=True)
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
    assert ask(Gate(waiting=True, keep_open=("/ping",)), "/ping")[0] == 200


def test_the_gate_says_when_its_time_is_over_and_stays_closed() -> None:
    gate = Gate(waiting=True)
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
    never = Gate(waiting=True)
    never.end()
    assert never.wait_until_opened(10) is False


def test_what_travels_in_a_request() -> None:
    handles, order = {"cpu:1": "a", "cpu:0": "b"}, Order(do="update", version="v", timeout=3.0)
    assert unpack(json.loads(json.dumps(pack(handles, order)))) == (handles, order)
    assert list(unpack(pack(handles, order))[0]) == ["cpu:1", "cpu:0"]
    assert unpack(handles) == (handles, None)
    same = [Report(rank, ok=rank == 1, phase="update", error="x") for rank in range(3)]
    assert describe_failures(same) == "worker 0, 2 failed in update: x"
    assert describe_failures([Report(0)]) == ""


def test_places_that_are_not_there() -> None:
    place = Place("x", ("json.no_such_name", "no.such.module.name", "json.decoder.NaN"), "nothing works")
    (found,) = places.find_places([place])
    assert found.target == ""
    assert "no_such_name" in found.problem
    assert "no.such.module" in found.problem
    assert "NaN: not a function" in found.problem
    (found,) = places.find_places([Place("x", ("no.such.name", "json.loads"), "")])
    assert (found.target, found.problem) == ("json.loads", "")
    assert places.version_numbers("0.5.10.post1") == (0, 5, 10)
    assert places.version_numbers("0.5.10rc1") < (0, 5, 11)
    assert places.version_numbers("of unknown version") == ()


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
        engine({routes.STATUS: (503, {})}).wait_ready(Deadline(3))
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
    fronted = front.Front(manager)
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
