"""How the ranks find each other, from what torchrun or the caller gives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import NamedTuple

import torch.distributed as dist

from checkpoint_engine.background import in_background
from checkpoint_engine.collective.control_plane import ControlPlane
from checkpoint_engine.collective.curve import given_secret
from checkpoint_engine.collective.meeting import BetweenHosts, Meeting, OnThisHost, needs_secret
from checkpoint_engine.collective.rank_store import RankStore
from checkpoint_engine.errors import RankError, SettingError

__all__ = ["connect_ranks"]

_STORE_TIMEOUT = timedelta(seconds=30)
_LARGEST_PORT = 65535
_made: Counter[tuple[int, str]] = Counter()


class _Address(NamedTuple):
    host: str
    port: int
    name: str
    """Of the run, among those of this user."""
    taken_by: Callable[[], dist.Store] | None = None
    """The store of torch that listens at this port, if one does. It lives longer than we do, and may serve several."""


def connect_ranks(
    rank: int, world_size: int, master_addr: str | None, master_port: int | None, store: dist.Store | None = None
) -> ControlPlane:
    """Begins to connect the ranks; returns at once, and whoever waits for another rank does so with a deadline.

    An address given here wins; then that of a store of torch, given here or of a default process group that the caller
    has; then `MASTER_ADDR` and `MASTER_PORT`. Such a store tells where the ranks meet, and nothing else: it is not
    protected from other users, and so is not believed.

    Raises:
        SettingError: no address is known, or rank 0 cannot listen there.
        AddressInUseError: the port on rank 0 is taken.
    """
    if world_size == 1:
        return ControlPlane(rank, world_size, None)
    if master_addr is None and master_port is None and (store is not None or dist.is_initialized()):
        default = dist.distributed_c10d._get_default_store  # pyright: ignore[reportPrivateUsage]
        address = _address_of(store if store is not None else default())
    else:
        address = _address_from_environment(master_addr, master_port)
    name = f"{address.name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if address.taken_by is not None:
        _made[rank, name] += 1
        name += f"/{_made[rank, name]}"
    meeting = _meeting(rank, world_size, address, name)
    plane = ControlPlane(rank, world_size, meeting)
    if isinstance(plane.store, RankStore):
        plane.store.home = address.host, address.port, name
    return plane


def _meeting(rank: int, world_size: int, address: _Address, name: str) -> Meeting:
    secret = given_secret()
    local = _local_ranks(world_size)
    here = local == world_size or (local is None and _is_loopback(address.host))
    if here or not secret:
        if local is not None and local < world_size:
            raise needs_secret(rank, address.host)
        return OnThisHost(name, rank, "" if here else address.host, address.port, secret)
    if not address.host:
        raise SettingError("ranks of several hosts need the address of rank 0: pass master_addr and master_port")
    if address.taken_by is None:
        return BetweenHosts(name, address.host, address.port, secret, lambda _: None)
    return BetweenHosts(name, address.host, 0, secret, _hint(address.taken_by, f"checkpoint-engine/{name}/port"))


def _hint(taken_by: Callable[[], dist.Store], key: str) -> Callable[[int | None], int | None]:
    """Tells, or asks for, a port, by a store that may hang or lie."""

    def hint(port: int | None) -> int | None:
        if port is not None:
            in_background(lambda: taken_by().set(key, str(port)), "checkpoint-engine-port")
            return port
        try:
            told = int(taken_by().get(key)) if taken_by().check([key]) else None
        except (RuntimeError, ValueError) as error:
            raise RankError(f"torch's store does not tell where rank 0 listens: {error}") from error
        return told if told is None or 0 < told <= _LARGEST_PORT else None

    return hint


def _local_ranks(world_size: int) -> int | None:
    """How many of the ranks are on this host, if the environment speaks of these ranks and says so."""
    try:
        if int(os.environ["WORLD_SIZE"]) == world_size:
            return int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        pass
    return None


def _is_loopback(host: str) -> bool:
    return host in ("", "localhost", "::1") or host.startswith("127.")


def _address_of(store: dist.Store) -> _Address:
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    if isinstance(inner, RankStore):
        host, port, name = inner.home
        return _Address(host, port, name, lambda: store)
    if isinstance(inner, dist.TCPStore):
        return _Address(inner.host, inner.port, f"port {inner.port}", lambda: store)
    if isinstance(inner, dist.FileStore):
        path = str(getattr(inner, "path", ""))  # the stub lacks it
        return _Address(os.environ.get("MASTER_ADDR", ""), 0, f"file {path}", lambda: store)
    raise SettingError(
        f"a {type(inner).__name__} does not say where the ranks could meet: pass master_addr and master_port"
    )


def _address_from_environment(master_addr: str | None, master_port: int | None) -> _Address:
    host = master_addr or os.environ.get("MASTER_ADDR")
    port = master_port if master_port is not None else _port_from_environment()
    if host is None or port is None:
        raise SettingError(
            "MASTER_ADDR and MASTER_PORT are not set: start with torchrun, or pass master_addr and master_port; a rank "
            "that is alone has WORLD_SIZE=1, and a command that no launcher started neither RANK nor WORLD_SIZE"
        )
    host = host.strip().removeprefix("[").removesuffix("]")
    hosted_by_agent = master_port is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    agent = cache(lambda: dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False))
    return _Address(host, port, f"port {port}", agent if hosted_by_agent else None)


def _port_from_environment() -> int | None:
    text = os.environ.get("MASTER_PORT")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise SettingError(f"MASTER_PORT is {text!r}, which is not a port number") from None
