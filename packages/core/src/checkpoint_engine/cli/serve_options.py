"""What `serve` and its rank processes tell each other."""

from __future__ import annotations

from pathlib import Path

import msgspec

from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.errors import SettingError

__all__ = ["FromServingRank", "Listening", "ServeOptions", "Stopped", "socket_path"]

_RANK_FIELD = "{rank}"
"""Stands for the number of the rank in the path of a socket."""


class ServeOptions(msgspec.Struct, frozen=True):
    """What every rank is told."""

    roots: tuple[str, ...]
    uds: str | None
    port: int | None
    host: str
    token_file: str | None
    device: str | None
    engine_hosts: tuple[str, ...]
    engine_sockets: tuple[str, ...] | None
    peer_hosts: tuple[str, ...] | None
    events: str | None


class Listening(msgspec.Struct, frozen=True, tag=True):
    """A rank answers at this address."""

    rank: int
    address: str


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """A rank could not start."""

    failure: Failure


FromServingRank = Listening | Stopped


def socket_path(template: str | None, rank: int, ranks: int) -> Path | None:
    """The socket of a rank; None if none was given.

    Raises:
        SettingError: several ranks would have the same.
    """
    if template is None:
        return None
    if ranks > 1 and _RANK_FIELD not in template:
        raise SettingError(f"--uds {template} is the same for {ranks} ranks; put {_RANK_FIELD} into it")
    return Path(template.replace(_RANK_FIELD, str(rank))).absolute()
