"""Serves a model: python -m transformers_engine.server DIRECTORY --port 8000 [--device cuda] [--dummy]."""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoint_engine.sdk import open_device, pick_handle, receive_update
from transformers_engine.sink import TransformersSink


class Engine:
    """The model and the one worker that updates it. A request or an update runs at a time."""

    def __init__(self, directory: str, device: str, *, dummy: bool) -> None:
        if dummy:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        else:
            model = AutoModelForCausalLM.from_pretrained(directory)
        self.model = model.to(device).eval()
        self.sink = TransformersSink(self.model)
        self._device = open_device(device)
        self._lock = threading.Lock()

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Greedy."""
        with self._lock, torch.no_grad():
            given = torch.tensor([tokens], device=self.model.device)
            done = self.model.generate(given, max_new_tokens=count, do_sample=False, use_cache=True)
            return done[0].tolist()

    def digest(self) -> str:
        """SHA-256 over names and bytes of all parameters."""
        found = hashlib.sha256()
        with self._lock:
            for name, parameter in sorted(self.model.named_parameters()):
                found.update(name.encode())
                found.update(parameter.data.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def checkpoint_engine_update(self, handles: dict[str, str], version: str, timeout: float) -> dict[str, Any]:
        """Takes an update; what goes wrong is reported, with what the worker holds after it."""
        error, verified = "", False
        with self._lock:
            try:
                handle = pick_handle(handles, self._device, 0, 1)
                verified = receive_update(handle, self.sink, self._device, timeout=timeout).verified
            except Exception as caught:  # noqa: BLE001 - whoever asked gets it, in words
                error = f"{type(caught).__name__}: {caught}"
        if not error and not verified and self.sink.version != version:
            error = f"version {self.sink.version!r} came"
        return {"ok": not error, "error": error, "verified": verified, **self.checkpoint_engine_status()}

    def checkpoint_engine_status(self) -> dict[str, Any]:
        """What the worker holds."""
        return {
            "state": self.sink.state.value,
            "dirty": self.sink.dirty,
            "version": self.sink.version,
            "updating": self._lock.locked(),
        }


class Handler(BaseHTTPRequestHandler):
    """JSON in, JSON out."""

    engine: Engine

    def do_GET(self) -> None:
        """What can be asked."""
        answers = {
            "/health": dict,
            "/get_world_size": lambda: {"world_size": 1},
            "/transformers": lambda: {"transformers": transformers.__version__},
            "/digest": lambda: {"digest": self.engine.digest()},
        }
        self._answer(answers.get(self.path, _no_route), status=200 if self.path in answers else 404)

    def do_POST(self) -> None:
        """What can be done."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        methods = {"checkpoint_engine_update", "checkpoint_engine_status"}
        if self.path == "/generate" and self.engine.sink.dirty:
            self._answer(lambda: {"error": "the weights may be a mixture: update again"}, status=503)
        elif self.path == "/generate":
            self._answer(lambda: {"tokens": self.engine.generate(body["tokens"], int(body.get("count", 8)))})
        elif self.path == "/collective_rpc" and body.get("method") in methods:
            self._answer(lambda: {"results": [getattr(self.engine, body["method"])(*body.get("args", []))]})
        else:
            self._answer(_no_route, status=404)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature of http.server
        """Stays quiet."""

    def _answer(self, make: Callable[[], object], status: int = 200) -> None:
        body = json.dumps(make()).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _no_route() -> object:
    return {"error": "there is no such route"}


def main() -> None:
    """Entry point of the process; prints where it listens once it does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="of a model, as save_pretrained writes it")
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dummy", action="store_true", help="start with random weights and wait for an update")
    options = parser.parse_args()
    Handler.engine = Engine(options.directory, options.device, dummy=options.dummy)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
