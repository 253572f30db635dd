"""Who belongs to a run: whoever knows its secret. Keys for CURVE are made of it, alike on all ranks."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from checkpoint_engine.errors import AccessRefusedError, SettingError
from checkpoint_engine.settings import SECRET_FILE_VARIABLE, SECRET_VARIABLE

__all__ = ["CurveKeys", "given_secret"]

_SHORTEST_SECRET = 16
_LONGEST_SECRET = 4096


class CurveKeys(NamedTuple):
    """The pair of the hub and the pair of all ranks. Neither public key is ever published."""

    hub_secret: bytes
    hub_public: bytes
    rank_secret: bytes
    rank_public: bytes

    @classmethod
    def of(cls, secret: bytes, purpose: str) -> CurveKeys:
        """Those of a run; another purpose has others."""
        hub, rank = (
            z85.encode(blake2b(purpose.encode(), key=blake2b(secret).digest(), person=who, digest_size=32).digest())
            for who in (b"ranks' hub", b"rank")
        )
        return cls(hub, zmq.curve_public(hub), rank, zmq.curve_public(rank))

    def arm_hub(self, socket: zmq.Socket[bytes]) -> None:
        """From now on only who has these keys is heard; before it is bound."""
        socket.curve_server = True
        socket.curve_secretkey, socket.curve_publickey = self.hub_secret, self.hub_public
        socket.zap_domain = b"ranks"

    def arm_rank(self, socket: zmq.Socket[bytes]) -> None:
        """From now on only a hub that has these keys is believed; before it is connected."""
        socket.curve_serverkey = self.hub_public
        socket.curve_secretkey, socket.curve_publickey = self.rank_secret, self.rank_public


def given_secret() -> bytes:
    """What the launcher has handed over, in the environment or in a file; empty if it has not.

    Raises:
        SettingError: it is too short, or cannot be read.
        AccessRefusedError: others can read the file.
    """
    secret = os.environ.get(SECRET_VARIABLE, "").strip().encode()
    source = SECRET_VARIABLE
    file = os.environ.get(SECRET_FILE_VARIABLE, "")
    if not secret and file:
        secret, source = _read_secret(Path(file)), file
    if secret and len(secret) < _SHORTEST_SECRET:
        raise SettingError(
            f"the secret in {source} has {len(secret)} characters; take {_SHORTEST_SECRET} at least: openssl rand -hex "
            "32 makes one"
        )
    return secret


def _read_secret(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            shared = os.fstat(opened.fileno()).st_mode & 0o077
            secret = opened.read(_LONGEST_SECRET).strip()
    except OSError as error:
        raise SettingError(f"cannot read the ranks' secret in {file}: {error.strerror}") from error
    if shared:
        raise AccessRefusedError(f"others can read the ranks' secret in {file}; run: chmod 600 {file}")
    return secret
