"""`--engine auto`: the engine is asked who it is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from checkpoint_engine.client.auto import AutoClient, identify, load_client
from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError
from checkpoint_engine.reference.engine import ModelSpec
from checkpoint_engine.reference.process import ReferenceProcess

Answers = dict[str, tuple[int, object]]


@pytest.fixture
def serving() -> Iterator[Callable[[Answers], Endpoint]]:
    """Serves JSON at some paths, and 404 at all others."""
    servers: list[ThreadingHTTPServer] = []

    def serve(answers: Answers) -> Endpoint:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content = answers.get(self.path, (404, {"detail": "Not Found"}))
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Endpoint(f"http://127.0.0.1:{server.server_port}")

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answers", "engine"),
    [
        ({"/model_info": (200, {"model_path": "x"})}, "sglang"),
        ({"/version": (200, {"version": "0.32.0"})}, "vllm"),
        # SGLang may get a /version of its own one day.
        ({"/model_info": (200, {"model_path": "x"}), "/version": (200, {"version": "1"})}, "sglang"),
    ],
)
def test_engines_are_told_apart(serving: Callable[[Answers], Endpoint], answers: Answers, engine: str) -> None:
    assert identify(serving(answers), Deadline(5)) == engine


def test_something_else_is_refused_at_once(serving: Callable[[Answers], Endpoint]) -> None:
    for answers in ({}, {"/version": (200, ["0.1"])}):
        with pytest.raises(EngineRequestError, match="none of sglang, vllm"):
            identify(serving(answers), Deadline(30))


def test_an_engine_that_starts_is_waited_for(serving: Callable[[Answers], Endpoint]) -> None:
    answers: Answers = {"/version": (503, {})}
    endpoint = serving(answers)
    threading.Timer(0.5, lambda: answers.update({"/version": (200, {"version": "1"})})).start()
    assert identify(endpoint, Deadline(20), wait=True) == "vllm"
    with pytest.raises(DeadlineError, match="no engine answered"):
        identify(Endpoint("http://127.0.0.1:9"), Deadline(0.5), wait=True)


def test_one_that_is_not_there_is_waited_for_by_nobody_but_those_who_wait(
    serving: Callable[[Answers], Endpoint],
) -> None:
    for endpoint, seen in ((Endpoint("http://127.0.0.1:9"), "refused"), (serving({"/version": (503, {})}), "503")):
        client, begun = AutoClient(endpoint.address), time.monotonic()
        with pytest.raises(EngineRequestError, match=f"no engine answers at.*{seen}"):
            client.status(Deadline(60))
        assert time.monotonic() - begun < 5


def test_it_speaks_as_the_engines_own_client() -> None:
    assert load_client("auto") is AutoClient
    with ReferenceProcess(ModelSpec().to_json(), 2) as engine:
        client = AutoClient(engine.endpoint)
        client.wait_ready(Deadline(30))
        assert client.world_size() == 2
