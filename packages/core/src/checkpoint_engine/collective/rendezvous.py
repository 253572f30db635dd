"""How the ranks find each other: one key-value store, on the address that torchrun or the caller gives."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta

import torch.distributed as dist

from checkpoint_engine.errors import AddressInUseError, DeadlineError, SettingError

_shared: Counter[int] = Counter()


def open_store(
    rank: int, world_size: int, master_addr: str | None, master_port: int | None, timeout: timedelta
) -> dist.Store:
    """Opens the store that all ranks share.

    An address given here wins; then a default process group that the caller has; then torchrun's own store or
    `MASTER_ADDR` and `MASTER_PORT`.

    Raises:
        SettingError: no address is known.
        AddressInUseError: the port on rank 0 is taken.
        DeadlineError: the other ranks did not come in time.
    """
    if world_size == 1:
        return dist.HashStore()
    if master_addr is None and master_port is None and dist.is_initialized():
        default = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        return _part_of(default, rank)
    host = master_addr or os.environ.get("MASTER_ADDR")
    port = master_port if master_port is not None else _port_from_environment()
    if host is None or port is None:
        raise SettingError(
            "MASTER_ADDR and MASTER_PORT are not set; start with torchrun, or pass master_addr and master_port"
        )
    hosted_by_agent = master_port is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not hosted_by_agent,
            timeout=timeout,
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise AddressInUseError(
                f"port {port} on {host} is in use; set MASTER_PORT (or master_port) to a free port"
            ) from error
        raise DeadlineError(f"rank {rank} could not reach the store of rank 0 at {host}:{port}: {error}") from error
    return _part_of(store, rank) if hosted_by_agent else store


def _part_of(store: dist.Store, rank: int) -> dist.Store:
    """A part of a store that outlives us; no other server and no earlier attempt of the job has written to it."""
    _shared[rank] += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"checkpoint-engine/{attempt}/{_shared[rank]}", store)


def _port_from_environment() -> int | None:
    text = os.environ.get("MASTER_PORT")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise SettingError(f"MASTER_PORT is {text!r}, which is not a port number") from None
