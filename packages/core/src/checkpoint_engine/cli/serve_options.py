"""What `serve` and its rank processes tell each other."""

from __future__ import annotations

from pathlib import Path

import msgspec

from checkpoint_engine.errors import SettingError

RANK_FIELD = "{rank}"
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


class Listening(msgspec.Struct, frozen=True, tag=True):
    """A rank answers at this address."""

    rank: int
    address: str


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """A rank could not start."""

    error: str
    message: str


FromServingRank = Listening | Stopped


def socket_path(template: str | None, rank: int, ranks: int) -> Path | None:
    """The socket of a rank; None if none was given.

    Raises:
        SettingError: several ranks would have the same.
    """
    if template is None:
        return None
    if ranks > 1 and RANK_FIELD not in template:
        raise SettingError(f"--uds {template} is the same for {ranks} ranks; put {RANK_FIELD} into it")
    return Path(template.replace(RANK_FIELD, str(rank))).absolute()
