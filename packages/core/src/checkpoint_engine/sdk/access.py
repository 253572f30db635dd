"""Who may use the routes that a plugin adds to its engine's server: holders of a key, or else this host alone."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

__all__ = ["TOKEN_VARIABLE", "Access", "RefusedError", "is_loopback"]

TOKEN_VARIABLE = "CHECKPOINT_ENGINE_TOKEN"  # noqa: S105 - its name, not its value
_UNAUTHORISED, _FORBIDDEN = 401, 403
_FROM_ELSEWHERE = ("origin", "forwarded", "x-forwarded-for", "x-real-ip")
"""Headers of what a browser asks for a page, and of what a proxy passes on."""


class RefusedError(Exception):
    """A request that is not carried out, and the HTTP status to say so with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Access:
    """Decides on requests."""

    def __init__(self, keys: Sequence[str], token: str | None, *, engine: str, option: str) -> None:
        """Takes the engine's own keys, one of which every request shows if there are any, and our token else.

        Args:
            keys: Of the engine.
            token: Ours, where the engine has no key.
            engine: What people call it.
            option: By which it is given a key.
        """
        self._shown = [f"Bearer {key}".encode() for key in (keys or ([token] if token else []))]
        self._whose = f"{engine}'s key ({option})" if keys else f"the token in {TOKEN_VARIABLE}"
        self._remedy = f"start {engine} with {option}, or with {TOKEN_VARIABLE} in its environment"

    def describe(self) -> str:
        """Who may ask, for people."""
        return f"whoever shows {self._whose}" if self._shown else "processes of this host, for no key is set"

    def check(self, headers: Mapping[str, str], host: str | None, asked: str | None = None) -> None:
        """Lets a request pass.

        Args:
            headers: Of the request, with names in small letters.
            host: The address that it comes from; None: through a Unix socket.
            asked: The address of ours that it came to: who asks from there is on this host too.

        Raises:
            RefusedError: it may not.
        """
        if self._shown:
            given = headers.get("authorization", "").encode()
            right = False
            for key in self._shown:  # all of them, so that the time tells nothing
                right |= hmac.compare_digest(given, key)
            if not right:
                raise RefusedError(_UNAUTHORISED, f"show {self._whose}: 'Authorization: Bearer …'")
            return
        passed_on = [name for name in _FROM_ELSEWHERE if name in headers]
        if passed_on or not (host is None or is_loopback(host) or host == asked):
            where = f"with the header {passed_on[0]}" if passed_on else f"from {host}"
            raise RefusedError(_FORBIDDEN, f"a request {where} is refused, for no key is set: {self._remedy}")


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this host has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
