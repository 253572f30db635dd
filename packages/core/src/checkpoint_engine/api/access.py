"""What a caller of the HTTP API may make this server touch: files, engines; and who is a caller at all."""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import httpx
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from checkpoint_engine.errors import AccessRefusedError, CheckpointFormatError, SettingError
from checkpoint_engine.sdk.access import is_loopback

__all__ = ["HEALTH_PATH", "BearerToken", "EngineAccess", "FileAccess", "PeerAccess"]

HEALTH_PATH = "/v1/healthz"


class FileAccess:
    """Files may come from below these directories only, wherever links lead."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]

    def check(self, path: str) -> Path:
        """The real path of a file that may be read.

        Raises:
            SettingError: the path is relative, or no path at all.
            AccessRefusedError: it leads out of the allowed directories.
            CheckpointFormatError: there is no such file.
        """
        if not path.startswith("/") or "\0" in path:
            raise SettingError(f"{path!r} is not an absolute path; this server's working directory is not yours")
        real = Path(os.path.realpath(path))
        self._require_below_a_root(real, path)  # before anybody looks whether it exists: that is nobody's business
        try:
            mode = real.stat().st_mode
        except OSError as error:
            raise CheckpointFormatError(f"cannot read {path}: {error.strerror}") from error
        if not stat.S_ISREG(mode):
            raise CheckpointFormatError(f"{path} is not a file")
        return real

    def open(self, path: Path, flags: int) -> int:
        """A descriptor of the file, and that is checked: a path can lead elsewhere a moment after it was looked at.

        Raises:
            AccessRefusedError: what was opened lies outside of the allowed directories.
            OSError: it cannot be opened.
        """
        descriptor = os.open(path, flags)
        try:
            self._require_below_a_root(Path(f"/proc/self/fd/{descriptor}").readlink(), str(path))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _require_below_a_root(self, real: Path, path: str) -> None:
        if not any(real.is_relative_to(root) for root in self._roots):
            allowed = ", ".join(map(str, self._roots)) or "none"
            raise AccessRefusedError(
                f"{path} is outside of the allowed directories ({allowed}); whoever runs this server can allow more "
                "with --allow-root DIR"
            )


class EngineAccess:
    """Engines may be asked on this host, on these other hosts, and at Unix sockets below these directories."""

    def __init__(self, hosts: Sequence[str], socket_roots: Sequence[str | Path]) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._socket_roots = [Path(os.path.realpath(root)) for root in socket_roots]

    def check_url(self, url: str) -> str:
        """The URL as it will be used, without user, query and fragment.

        Raises:
            SettingError: it is no HTTP URL.
            AccessRefusedError: its host is not allowed.
        """
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise SettingError(f"update_url {url!r} is no URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise SettingError(f"update_url {url!r} must look like http://127.0.0.1:8000/collective_rpc")
        host = parsed.host.lower()
        if not (_is_loopback(host) or host in self._hosts):
            raise AccessRefusedError(
                f"update_url points to {host}, and this server asks engines on its own host only; whoever runs it can "
                f"allow more with --allow-engine-host {host}"
            )
        return str(parsed.copy_with(username=None, password=None, query=None, fragment=None))

    def check_socket(self, path: str) -> str:
        """The real path of an engine's Unix socket.

        Raises:
            AccessRefusedError: it is outside of the allowed directories.
            SettingError: there is no socket.
        """
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self._socket_roots):
            raise AccessRefusedError(
                f"the socket {path} is outside of the allowed directories; whoever runs this server can allow more "
                "with --allow-engine-socket DIR"
            )
        if not real.is_socket():
            raise SettingError(f"there is no Unix socket at {path}")
        return str(real)


class PeerAccess:
    """Memory of other parameter servers may be read on this host, and on these other hosts or on all of them."""

    def __init__(self, hosts: Sequence[str], *, anywhere: bool) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._anywhere = anywhere

    def check(self, address: str | None) -> None:
        """Raises if an update may not read from an address, `HOST:PORT`.

        Raises:
            AccessRefusedError: its host is not allowed.
        """
        if self._anywhere or not address:
            return
        host = address.rpartition(":")[0].strip("[]").lower() or address.lower()
        if not (_is_loopback(host) or host in self._hosts):
            raise AccessRefusedError(
                f"the metas name memory at {address}, and this server reads that of its own host only; whoever runs it "
                f"can allow more with --allow-peer-host {host}"
            )


class BearerToken:
    """Turns away requests without the token, before anything of them is read. The health check is for everybody."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] == "lifespan" or scope.get("path") == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        shown = Headers(scope=scope).get("authorization", "").encode()
        if hmac.compare_digest(shown, self._expected):
            await self._app(scope, receive, send)
            return
        answer = JSONResponse(
            {"error": "AccessRefusedError", "message": "show the token: 'Authorization: Bearer <token>'"},
            status_code=401,
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
        await answer(scope, receive, send)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or is_loopback(host)
