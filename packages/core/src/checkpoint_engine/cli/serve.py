"""`checkpoint-engine serve`: the HTTP API, one server for each rank."""

import importlib.util
import os
import queue
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
import typer

from checkpoint_engine.cli.common import DeviceKind, Verbose, encoded, output
from checkpoint_engine.cli.options import share_memory
from checkpoint_engine.cli.serve_options import (
    FromServingRank,
    Listening,
    ServeOptions,
    Stopped,
    socket_path,
)
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.errors import (
    CheckpointEngineError,
    MissingDependencyError,
    RankError,
    SettingError,
    error_named,
)
from checkpoint_engine.processes import Child, end_all
from checkpoint_engine.settings import SECRET_VARIABLE

__all__ = ["serve"]

_WHERE = "Where it listens"
_ALLOWED = "What callers may touch"
_RANK_MODULE = "checkpoint_engine.cli.serving"

_Events = queue.SimpleQueue[tuple[int, bytes | None]]
"""Rank and what it wrote; no line once it has ended; rank -1 for a signal to this process."""


def serve(
    allow_root: Annotated[
        list[Path],
        typer.Option(
            help="Files below this directory may be registered. Repeat it for more.",
            rich_help_panel=_ALLOWED,
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Start so many ranks on this host; under torchrun leave it out.", show_default=False),
    ] = None,
    uds: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Unix socket, with {rank} in it if there are several ranks.",
            rich_help_panel=_WHERE,
            show_default="in $XDG_RUNTIME_DIR or a private directory below /tmp",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="TCP port instead; rank r takes PORT + r, and 0 any free port. Needs a token.",
            rich_help_panel=_WHERE,
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address for --port. There is no encryption: keep it in a trusted network.", rich_help_panel=_WHERE
        ),
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Holds the token for --port; mode 0600. Without it, CHECKPOINT_ENGINE_TOKEN counts.",
            rich_help_panel=_WHERE,
            show_default=False,
        ),
    ] = None,
    allow_engine_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Engines may be asked on this host too, not just here. Repeatable.",
            rich_help_panel=_ALLOWED,
            show_default=False,
        ),
    ] = None,
    allow_engine_socket: Annotated[
        list[Path] | None,
        typer.Option(
            help="Engines' Unix sockets must lie below this directory. Repeatable.",
            rich_help_panel=_ALLOWED,
            show_default="anywhere with --uds, nowhere with --port",
        ),
    ] = None,
    allow_peer_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Metas posted to /v1/metas may name memory on this host too. Repeatable.",
            rich_help_panel=_ALLOWED,
            show_default="any host with --uds, only this one with --port",
        ),
    ] = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Let replicas that join later read gathered checkpoints from the ranks' host memory (see join). The "
            "ranks listen on further ports, and whoever reaches those can read and write the memory: trusted networks "
            "only.",
            rich_help_panel=_ALLOWED,
        ),
    ] = False,
    events: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Rank 0 publishes what becomes of updates at tcp://HOST:PORT (and the next port) or ipc:///PATH. Not "
            "encrypted, and TCP is open to whoever reaches it.",
            rich_help_panel=_WHERE,
            show_default="CHECKPOINT_ENGINE_EVENTS",
        ),
    ] = None,
    device: Annotated[
        DeviceKind,
        typer.Option(
            help="Where the engines' workers run; cpu also for ranks that only update directly, which need no GPU.",
        ),
    ] = DeviceKind.AUTO,
    verbose_: Verbose = False,
) -> None:
    """Serve the parameter server over HTTP: register, gather, update, progress, abort.

    Each rank has a server of its own. Unless told otherwise it is a Unix socket that only you can open. The routes are
    described at /openapi.json and, for people, at /docs.

    \b
    [dim]# one rank, for one engine worker[/]
    checkpoint-engine serve --allow-root /models --uds /run/me/ps.sock
    curl --unix-socket /run/me/ps.sock http://localhost/v1/version

    \b
    [dim]# two ranks on this host, over TCP[/]
    export CHECKPOINT_ENGINE_TOKEN=$(python -c 'import secrets; print(secrets.token_urlsafe(32))')
    checkpoint-engine serve --allow-root /models --ranks 2 --port 9000

    \b
    [dim]# one rank for all workers of this host, updated with "method": "direct", "workers": 8[/]
    checkpoint-engine serve --allow-root /models --ranks 1 --device cpu
    """
    del verbose_
    _check_extra()
    if uds is not None and port is not None:
        raise SettingError("--uds and --port exclude each other")
    if share:
        share_memory()
    missing = [str(root) for root in allow_root if not root.is_dir()]
    if missing:
        raise SettingError(f"--allow-root {missing[0]} is not a directory")
    options = ServeOptions(
        roots=tuple(str(root.resolve()) for root in allow_root),
        uds=uds,
        port=port,
        host=host,
        token_file=str(token_file) if token_file else None,
        device=device.value,
        engine_hosts=tuple(allow_engine_host or ()),
        engine_sockets=None if allow_engine_socket is None else tuple(str(path) for path in allow_engine_socket),
        events=events,
        peer_hosts=None if allow_peer_host is None else tuple(allow_peer_host),
    )
    if ranks is None:
        _serve_here(options)
        return
    if "RANK" in os.environ:
        raise SettingError("torchrun has started this rank already; leave --ranks out")
    socket_path(uds, 0, ranks)
    _serve_children(encoded(options), ranks)


def _check_extra() -> None:
    for library in ("fastapi", "prometheus_client", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise MissingDependencyError(
                f"the HTTP API needs {library}, which is missing: pip install 'checkpoint-engine-core[api]'"
            )


def _serve_here(options: ServeOptions) -> None:
    from checkpoint_engine.cli.serving import leave, serve_rank  # noqa: PLC0415 - brings torch

    serve_rank(options, _say)
    leave(0)


def _serve_children(options: bytes, count: int) -> None:
    events: _Events = queue.SimpleQueue()
    _on_signals(lambda: events.put((-1, None)))
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        SECRET_VARIABLE: secrets.token_hex(32),  # nobody else's rank comes between these
    }
    children = [_start(rank, common, options, events) for rank in range(count)]
    try:
        while True:
            rank, line = events.get()
            if rank < 0:
                return
            if line is None:
                raise RankError(f"rank {rank} (pid {children[rank].pid}) {children[rank].describe_end()}")
            message = msgspec.json.decode(line, type=FromServingRank)
            if isinstance(message, Stopped):
                raise _as_error(rank, message.failure)
            _say(message)
    finally:
        end_all(children)


def _start(rank: int, common: dict[str, str], options: bytes, events: _Events) -> Child:
    child = Child(
        f"rank {rank}",
        [_RANK_MODULE],
        on_line=lambda _child, line: events.put((rank, line)),
        on_end=lambda _child: events.put((rank, None)),
        environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
    )
    child.send(options)
    return child


def _on_signals(stop: Callable[[], None]) -> None:
    def handle(_signal: int, _frame: FrameType | None) -> None:
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _as_error(rank: int, failure: Failure) -> CheckpointEngineError:
    kind = error_named(failure.error)
    return RankError(f"rank {rank}: {failure.text}") if kind is None else kind(failure.message)


def _say(listening: Listening) -> None:
    output.print(f"rank {listening.rank} listens on {listening.address}", soft_wrap=True, highlight=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
