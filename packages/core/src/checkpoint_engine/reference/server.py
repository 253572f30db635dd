"""Runs a reference engine: worker processes behind an HTTP front with the routes of a vLLM in development mode.

python -m checkpoint_engine.reference.server --spec '{"layers": 4}' --tensor-parallel-size 2 --port 8000
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import msgspec

from checkpoint_engine.errors import AddressInUseError, CheckpointEngineError, SettingError
from checkpoint_engine.reference.workers import FRONT_FAULTS, WORKER_FAULTS, Request, Workers

__all__ = ["Front", "Handler", "RpcBody", "UnixHTTPServer", "main", "open_server"]

_PAUSE_MODES = ("keep", "abort", "wait")
_LONGEST_BODY = 16 << 20
_UPDATES = ("checkpoint_engine_update", "update_weights_from_ipc")
_PARENT_CHECK_SECONDS = 0.5


class RpcBody(msgspec.Struct, frozen=True):
    """Body of `POST /collective_rpc`."""

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = None


class _HttpError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Front:
    """What the routes do."""

    def __init__(self, workers: Workers, world_size: int, fault: str) -> None:
        self._workers = workers
        self._world_size = world_size
        self._fault = fault
        self._paused = False
        self._closing = threading.Event()
        self.routes: dict[tuple[str, str], Callable[[dict[str, str], bytes], object]] = {
            ("GET", "/health"): self._health,
            ("GET", "/get_world_size"): lambda _query, _body: {"world_size": self._world_size},
            ("GET", "/is_paused"): lambda _query, _body: {"is_paused": self._paused},
            ("GET", "/pids"): lambda _query, _body: {"pids": self._workers.pids},
            ("POST", "/collective_rpc"): self._collective_rpc,
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("POST", "/fault"): self._set_fault,
            ("POST", "/reset_prefix_cache"): lambda _query, _body: {"success": True},
        }

    def close(self) -> None:
        """Lets requests that hang go."""
        self._closing.set()

    def _health(self, _query: dict[str, str], _body: bytes) -> object:
        if not self._workers.ready:
            raise _HttpError(503, "the workers are not up")
        return {}

    def _pause(self, query: dict[str, str], _body: bytes) -> object:
        mode = query.get("mode", "abort")
        if mode not in _PAUSE_MODES:
            raise _HttpError(400, f"mode is {mode!r}; it can be {', '.join(_PAUSE_MODES)}")
        self._paused = True
        return {"status": "paused"}

    def _resume(self, _query: dict[str, str], _body: bytes) -> object:
        self._paused = False
        return {"status": "resumed"}

    def _collective_rpc(self, _query: dict[str, str], body: bytes) -> object:
        try:
            rpc = msgspec.json.decode(body, type=RpcBody)
        except msgspec.MsgspecError as error:
            raise _HttpError(400, str(error)) from error
        if rpc.method in _UPDATES:
            self._strike()
        try:
            results = self._workers.call(Request(0, rpc.method, rpc.args, rpc.kwargs), rpc.timeout or 600.0)
        except CheckpointEngineError as error:
            raise _HttpError(500, str(error)) from error
        return {"results": results}

    def _set_fault(self, query: dict[str, str], _body: bytes) -> object:
        fault = query.get("name", "")
        if fault not in (*FRONT_FAULTS, *WORKER_FAULTS):
            raise _HttpError(400, f"there is no fault {fault!r}")
        if fault in FRONT_FAULTS:
            self._fault = fault
        else:
            self._workers.call(Request(0, "set_fault", [fault]), 10.0)
        return {}

    def _strike(self) -> None:
        fault, self._fault = self._fault, ""
        if fault == "error500":
            raise _HttpError(500, "this engine was told to answer 500")
        if fault == "hang":
            self._closing.wait()


class Handler(BaseHTTPRequestHandler):
    """Finds the route and writes its JSON."""

    protocol_version = "HTTP/1.1"
    front: Front

    def do_GET(self) -> None:
        """Answers GET."""
        self._answer()

    def do_POST(self) -> None:
        """Answers POST."""
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature of http.server
        """Stays quiet."""

    def _answer(self) -> None:
        try:
            status, content = 200, self._run_route()
        except _HttpError as error:
            status, content = error.status, {"error": str(error)}
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # whoever asked has given up

    def _run_route(self) -> object:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _LONGEST_BODY:
            self.close_connection = True
            raise _HttpError(413, f"the body has {length} bytes, at most {_LONGEST_BODY} are taken")
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        route = self.front.routes.get((self.command, parts.path))
        if route is None:
            raise _HttpError(404, f"there is no route {self.command} {parts.path}")
        return route({name: values[-1] for name, values in parse_qs(parts.query).items()}, body)


class UnixHTTPServer(ThreadingHTTPServer):
    """The same on a Unix socket that only this user may open."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Binds the path; a socket that a dead server has left there is replaced."""
        path = Path(cast("str", self.server_address))
        _remove_dead_socket(path)
        mask = os.umask(0o177)
        try:
            socketserver.TCPServer.server_bind(self)
        finally:
            os.umask(mask)
        self.server_name, self.server_port = str(path), 0

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection; Unix sockets have no address that the handler could use."""
        connection, _ = self.socket.accept()
        return connection, ("unix", 0)


def _remove_dead_socket(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def open_server(uds: str | None, port: int) -> ThreadingHTTPServer:
    """Listens on a Unix socket, or on a port of the loopback interface (0: any that is free).

    Raises:
        AddressInUseError: another process listens there.
        SettingError: the socket's directory does not exist, or its path is too long.
    """
    where = uds or f"127.0.0.1:{port}"
    handler = type("BoundHandler", (Handler,), {})
    try:
        server = UnixHTTPServer(uds, handler) if uds else ThreadingHTTPServer(("127.0.0.1", port), handler)  # pyright: ignore[reportArgumentType]
    except FileNotFoundError as error:
        raise SettingError(f"cannot listen on {where}: its directory does not exist") from error
    except OSError as error:
        raise AddressInUseError(
            f"cannot listen on {where}: {error.strerror or error}; choose another address"
        ) from error
    server.daemon_threads = True
    server.block_on_close = False
    return server


def _stop_without_parent(stop: Callable[[], None]) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        threading.Event().wait(_PARENT_CHECK_SECONDS)
    stop()


def _serve(options: argparse.Namespace) -> None:
    server = open_server(options.uds, options.port)
    stopping = threading.Event()

    def stop(_signal: int = 0, _frame: FrameType | None = None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=_stop_without_parent, args=(stop,), daemon=True).start()
    workers = Workers(options.tensor_parallel_size, options.spec, options.device, options.fault)
    front = Front(workers, options.tensor_parallel_size, options.fault)
    cast("type[Handler]", server.RequestHandlerClass).front = front
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    where = f"unix:{options.uds}" if options.uds else f"http://127.0.0.1:{server.server_port}"
    sys.stdout.write(f"listening on {where}\n")
    sys.stdout.flush()
    try:
        stopping.wait()
    finally:
        front.close()
        server.shutdown()
        server.server_close()
        workers.close()
        if options.uds:
            Path(options.uds).unlink(missing_ok=True)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="{}", help="the model as JSON, or a file with that; see ModelSpec")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:K for GPUs from K on")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--uds", help="listen on this Unix socket")
    where.add_argument("--port", type=int, default=0, help="listen on this port of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--fault", choices=(*FRONT_FAULTS, *WORKER_FAULTS), default="", help="for tests: fail once")
    options = parser.parse_args()
    try:
        _serve(options)
    except CheckpointEngineError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
