"""A server that is asked over HTTP, at a TCP address or on a Unix socket."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from checkpoint_engine import limits
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError, SettingError

if TYPE_CHECKING:
    import httpx

__all__ = ["Endpoint", "NoEndpoint", "Reply", "shorten", "with_scheme"]

_LONGEST_TEXT = 2000
"""Characters of a server's answer that are repeated in an error."""
_SUCCESS = range(200, 300)
_WITHOUT_SCHEME = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\]):\d+/?")
"""As people say it: `localhost:8000`."""
_UNAUTHORISED = 401

_API_KEY = "CHECKPOINT_ENGINE_API_KEY"
"""Environment variable: the key that an engine asks for (`--api-key`, `--admin-api-key`)."""


@dataclass(frozen=True)
class Reply:
    """What the server answered."""

    status: int
    text: str

    @property
    def ok(self) -> bool:
        """Whether the status says success."""
        return self.status in _SUCCESS


class Endpoint:
    """`http://host:port`, `https://host:port` or `unix:/path/to.sock`; `host:port` is asked over HTTP."""

    def __init__(self, address: str, *, api_key: str | None = None) -> None:
        """Remembers where to ask; `api_key` is sent along, or else what CHECKPOINT_ENGINE_API_KEY says."""
        self.address = address
        key = os.environ.get(_API_KEY, "") if api_key is None else api_key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._base_url, self._socket = _parse(address)
        self._tls = _tls_of(self._base_url)

    def send(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
    ) -> Reply:
        """Sends one request and returns the reply, whatever its status.

        Raises:
            EngineRequestError: nobody listens there, or the connection broke.
            DeadlineError: nothing took the connection within 5 s, or no answer came in time.
        """
        import httpx  # noqa: PLC0415 - a quarter of a second, which a wrong word on the command line need not wait for

        request = f"{method} {path}"
        deadline.check(f"{request} to {self.address}")
        try:
            self._probe(deadline)
            with (
                # Proxies of the environment are for the internet, not for an engine beside us.
                httpx.Client(
                    base_url=self._base_url,
                    transport=httpx.HTTPTransport(uds=self._socket, trust_env=False, verify=self._tls),
                    timeout=httpx.Timeout(deadline.remaining, connect=min(limits.CONNECT, deadline.remaining)),
                    trust_env=False,
                    headers=self._headers,
                ) as client,
                client.stream(method, path, params=query, json=body) as response,
            ):
                text = self._read(response, deadline, request)
                if response.status_code == _UNAUTHORISED:
                    given = "does not take the key that it is given" if self._headers else "asks for a key"
                    text = f"it {given}; set {_API_KEY} to that of the engine ({shorten(text)})"
                return Reply(response.status_code, text)
        except httpx.ConnectTimeout as error:
            raise DeadlineError(f"{self.address} takes no connection: is its host there?") from error
        except httpx.TimeoutException as error:
            raise DeadlineError(f"{self.address} did not answer {request} within {deadline.said}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineRequestError(f"cannot ask {self.address} for {request}: {_describe(error)}") from error

    def call(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
    ) -> Any:  # noqa: ANN401 - whatever JSON the server answers
        """Sends one request and returns the JSON of its reply; None if that is empty.

        Raises:
            EngineRequestError: nobody listens, the server answers with an error, or not with JSON.
            DeadlineError: no answer came in time.
        """
        reply = self.send(method, path, deadline, query=query, body=body)
        if not reply.ok:
            raise EngineRequestError(
                f"{self.address} answered {method} {path} with {reply.status}: {shorten(reply.text)}"
            )
        if not reply.text.strip():
            return None
        try:
            return json.loads(reply.text)
        except ValueError:
            raise EngineRequestError(
                f"{self.address} answered {method} {path} with what is not JSON: {shorten(reply.text)}"
            ) from None

    def _probe(self, deadline: Deadline) -> None:
        """Knocks at a Unix socket: httpcore leaks its own socket when nobody listens there."""
        if self._socket is None:
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(max(deadline.remaining, 0.001))  # 0 would not wait at all
            try:
                probe.connect(self._socket)
            except OSError as error:
                raise EngineRequestError(f"cannot ask {self.address}: {error.strerror or error}") from error

    def _read(self, response: httpx.Response, deadline: Deadline, request: str) -> str:
        pieces: list[str] = []
        for piece in response.iter_text():
            # The timeout of httpx starts anew with every piece; ours does not.
            deadline.check(f"the whole answer of {self.address} to {request}")
            pieces.append(piece)
        return "".join(pieces)


class NoEndpoint(Endpoint):
    """In the place of one, for an engine of this process: it has a name, and is called rather than asked."""

    def __init__(self, name: str) -> None:
        self.address = name

    def send(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
    ) -> Reply:
        """Nobody listens there.

        Raises:
            EngineRequestError: always.
        """
        del deadline, query, body
        raise EngineRequestError(f"{self.address} is no server: it cannot be asked for {method} {path}")


def with_scheme(address: str) -> str:
    """The address of an endpoint, with the scheme that people leave out."""
    return f"http://{address}" if _WITHOUT_SCHEME.fullmatch(address) else address


def shorten(text: str) -> str:
    """The beginning of a long text, fit for an error message."""
    text = text.strip()
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"


def _parse(address: str) -> tuple[str, str | None]:
    address = with_scheme(address)
    parts = urlsplit(address)
    if parts.scheme == "unix" and parts.path and not parts.netloc:
        return "http://localhost", parts.path
    if parts.scheme in ("http", "https") and parts.hostname:
        return address, None
    raise SettingError(f"{address!r} is no endpoint; use http://HOST:PORT or unix:/path/to.sock")


def _tls_of(url: str) -> ssl.SSLContext:
    """Reading the authorities takes 20 ms, which httpx would spend on every request, and on those without TLS too."""
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    import httpx  # noqa: PLC0415 - as above

    return httpx.create_ssl_context()


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
