"""One rank behind the HTTP API: in this process, or as a child of `checkpoint-engine serve --ranks N`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from checkpoint_engine.api import create_app, serving
from checkpoint_engine.cli.serve_options import Listening, ServeOptions, Stopped, socket_path
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.processes import ParentPipe
from checkpoint_engine.server.parameter_server import ParameterServer

__all__ = ["leave", "main", "serve_rank"]


def serve_rank(options: ServeOptions, announce: Callable[[Listening], None]) -> None:
    """Serves this process's rank until SIGTERM or SIGINT.

    Raises:
        CheckpointEngineError: it cannot start: an address in use, no token, no such device.
    """
    # Until the HTTP server handles signals itself, they must not skip the cleaning up below.
    signal.signal(signal.SIGTERM, _exit)
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    with ParameterServer(
        rank=0 if alone else None, world_size=1 if alone else None, device=options.device, events=options.events
    ) as server:
        if options.port is None:
            token = None
            path = socket_path(options.uds, server.rank, server.world_size) or serving.default_socket_path(server.rank)
            listener, address = serving.listen_unix(path), f"unix:{path}"
        else:
            token = serving.read_token(Path(options.token_file) if options.token_file else None)
            listener = serving.listen_tcp(options.host, options.port + server.rank if options.port else 0)
            address = f"http://{options.host}:{listener.getsockname()[1]}"
        with serving.closing(listener):
            app = create_app(
                server,
                allowed_roots=options.roots,
                token=token,
                engine_hosts=options.engine_hosts,
                engine_socket_roots=options.engine_sockets,
                peer_hosts=options.peer_hosts,
            )
            announce(Listening(server.rank, address))
            serving.serve(app, listener, on_stop=lambda: _stop(server))


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    sys.exit(0)


def _stop(server: ParameterServer) -> None:
    server.abort("the parameter server was told to stop")


def leave(code: int) -> None:
    """Ends the process; a request that still waits for other ranks must not hold it up."""
    waiting = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if waiting:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Entry point of a child process: options come as one line, and the end of the pipe ends the rank."""
    pipe = ParentPipe()
    lines = pipe.lines()
    options = msgspec.json.decode(next(lines), type=ServeOptions)

    def follow() -> None:
        for _ in lines:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="follows the parent", daemon=True).start()
    try:
        serve_rank(options, lambda listening: pipe.send(msgspec.json.encode(listening)))
    except CheckpointEngineError as error:
        pipe.send(msgspec.json.encode(Stopped(Failure.of(error, Phase.START, int(os.environ.get("RANK", "0"))))))
        sys.exit(1)
    leave(0)


if __name__ == "__main__":
    main()
