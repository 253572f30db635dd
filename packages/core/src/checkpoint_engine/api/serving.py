"""Where the HTTP API listens: a Unix socket that only this user may open, or a port that asks for a token."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from checkpoint_engine.api.connections import MOST_CONNECTIONS, BoundedProtocol
from checkpoint_engine.errors import AccessRefusedError, AddressInUseError, SettingError
from checkpoint_engine.owned_directory import temporary_root

__all__ = ["closing", "default_socket_path", "listen_tcp", "listen_unix", "read_token", "serve", "server_for"]

_TOKEN_VARIABLE = "CHECKPOINT_ENGINE_TOKEN"  # noqa: S105 - its name, not its value
_SHORTEST_TOKEN = 16
_LONGEST_SOCKET_PATH = 107
_KEEP_ALIVE_SECONDS = 60
_GRACE_SECONDS = 5
_MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"  # noqa: S105


def default_socket_path(rank: int) -> Path:
    """Where rank `rank` of this user listens unless told otherwise."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = (
        Path(runtime, "checkpoint-engine") if runtime else Path(temporary_root(), f"checkpoint-engine-{os.geteuid()}")
    )
    return directory / f"ps-{rank}.sock"


def listen_unix(path: Path) -> socket.socket:
    """Listens on a socket of mode 0600; a directory that is missing is made with mode 0700.

    Raises:
        AddressInUseError: another process listens there, or something else has that name.
        AccessRefusedError: other users could put their own socket in its place.
        SettingError: the path is too long, or cannot be made.
    """
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise SettingError(f"the socket path {path} is longer than {_LONGEST_SOCKET_PATH} bytes; choose a shorter one")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(path.parent)
        _remove_dead_socket(path)
        return _bind_private(path)
    except OSError as error:
        if isinstance(error, (AddressInUseError, AccessRefusedError)):
            raise
        raise SettingError(f"cannot listen on {path}: {error.strerror}") from error


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listens on a port.

    Raises:
        AddressInUseError: the port is taken.
        SettingError: the host is not one of this machine's, or the port is none.
    """
    if not 0 <= port < 1 << 16:
        raise SettingError(f"{port} is not a port; ports are 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingError(f"cannot listen on {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise AddressInUseError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return listener


def read_token(file: Path | None) -> str:
    """The token from a file, else from the environment. Never from the command line, which everybody can read.

    Raises:
        SettingError: there is none, or it is too short to be a secret.
        AccessRefusedError: others can read the file.
    """
    if file is None:
        token, source = os.environ.get(_TOKEN_VARIABLE, ""), _TOKEN_VARIABLE
    else:
        token, source = _read_private(file), str(file)
    token = token.strip()
    if not token:
        raise SettingError(
            f"a TCP port needs a token: set {_TOKEN_VARIABLE}, or pass --token-file; make one with {_MAKE_TOKEN}"
        )
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise SettingError(
            f"the token in {source} needs at least {_SHORTEST_TOKEN} printable characters; make one with {_MAKE_TOKEN}"
        )
    return token


def serve(app: FastAPI, listener: socket.socket, on_stop: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT; `on_stop` is called, in a thread, the moment one comes."""
    server_for(app, on_stop).run(sockets=[listener])


def server_for(app: FastAPI, on_stop: Callable[[], None]) -> uvicorn.Server:
    """What serves an application: only so many connections, and none that keeps silent."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=BoundedProtocol,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS + 1,
        backlog=MOST_CONNECTIONS,  # asyncio accepts so many before it looks at one of them
        log_level="warning",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return _Server(config, on_stop)


@contextlib.contextmanager
def closing(listener: socket.socket) -> Generator[socket.socket]:
    """Closes the socket in the end, and removes its file if it has one."""
    own_path = Path(listener.getsockname()) if listener.family == socket.AF_UNIX else None
    try:
        yield listener
    finally:
        listener.close()
        if own_path is not None:
            own_path.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Ends what runs before it waits for it to end."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal. The original would raise the signal again afterwards, past our own cleaning up."""
        del sig, frame
        self.force_exit = self.should_exit
        self.should_exit = True
        threading.Thread(target=self._on_stop, name="checkpoint-engine-stop", daemon=True).start()


def _check_directory(directory: Path) -> None:
    """Others may not be able to rename or remove what we put there."""
    status = directory.stat()
    loose = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    if loose or status.st_uid not in (os.geteuid(), 0):
        raise AccessRefusedError(
            f"other users can replace files in {directory}; choose a directory of your own with mode 0700"
        )


def _remove_dead_socket(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise AddressInUseError(f"{path} exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise AddressInUseError(f"another process listens on {path}; stop it or choose another path")


def _bind_private(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # so that it never exists with a looser mode
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.listen()
    return listener


def _read_private(file: Path) -> str:
    try:
        with file.open() as opened:
            mode, text = os.fstat(opened.fileno()).st_mode, opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read the token file {file}: {error}") from error
    if mode & 0o077:
        raise AccessRefusedError(f"others can read the token in {file}; run: chmod 600 {file}")
    return text
