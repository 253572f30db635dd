"""Mooncake's transfer engine: reads other processes' memory over RDMA, EFA or TCP.

Its calls return a number and leave the reason in a log; this module turns them into exceptions and knows which
transport will really be used, since the engine falls back to TCP without a word.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal

from checkpoint_engine import limits
from checkpoint_engine.errors import AddressInUseError, HostMemoryError, MissingDependencyError, SettingError

__all__ = ["CHECKS_ADDRESSES", "MooncakeEngine", "Transport", "import_engine", "installed_version"]

Transport = Literal["rdma", "efa", "tcp"]

_ALTERNATIVES = (
    "pip install 'checkpoint-engine-core[p2p]' (CUDA 12), or instead of that one of mooncake-transfer-engine-cuda13 "
    "(CUDA 13), mooncake-transfer-engine-non-cuda (no GPU), mooncake-transfer-engine-efa (AWS)"
)
_DISTRIBUTIONS = tuple(f"mooncake-transfer-engine{build}" for build in ("", "-cuda13", "-non-cuda", "-efa"))
_OVERLAPS = -7
"""Mooncake's answer to memory that overlaps what it knows."""

CHECKS_ADDRESSES = (0, 3, 12)
"""From this version on, Mooncake refuses over TCP what is not registered; before, it serves any address to anybody."""


class MooncakeEngine:
    """One engine: it answers other hosts' reads of registered memory, and reads theirs. It never closes itself."""

    def __init__(self, host: str, transport: Transport, devices: Sequence[str], patience: float) -> None:
        """Starts it.

        Args:
            host: An address of this host under which others reach it.
            transport: By which it reads and is read.
            devices: RDMA devices that it uses; none for TCP.
            patience: Seconds after which a read that makes no progress fails.

        Raises:
            MissingDependencyError: Mooncake, or a library that it needs, is not installed.
            SettingError: it does not start on this host with these devices.
            AddressInUseError: it found no free port.
        """
        _set_defaults(patience)
        self.transport = transport
        self._engine = import_engine()()
        if self._engine.initialize(host, "P2PHANDSHAKE", transport, ",".join(devices)) != 0:
            raise SettingError(
                f"Mooncake's transfer engine did not start on {host} over {transport} "
                f"({', '.join(devices) or 'no RDMA device'}); its own messages stand above"
            )
        port = int(self._engine.get_rpc_port())
        if port <= 0:
            raise AddressInUseError(f"Mooncake's transfer engine found no free port on {host}")
        self.address = f"{f'[{host}]' if ':' in host else host}:{port}"

    def register(self, address: int, nbytes: int) -> None:
        """Lets others read this memory, and reads land in it.

        Raises:
            HostMemoryError: the network card cannot register it, or the engine still knows memory at this address.
        """
        code = self._engine.register_memory(address, nbytes)
        if code == 0:
            return
        if code == _OVERLAPS:
            way_out = f"at {address:#x} it knows other memory, which nobody unregistered; start this process anew"
        elif self.transport == "tcp":
            way_out = "its own messages stand above"
        else:
            way_out = "raise the memlock limit (ulimit -l unlimited; in containers --ulimit memlock=-1)"
        raise HostMemoryError(
            f"Mooncake cannot register {nbytes} bytes of host memory for {self.transport} (code {code}): {way_out}"
        )

    def unregister(self, address: int) -> None:
        """Ends that; others' reads of it fail from now on."""
        self._engine.unregister_memory(address)

    def read(self, peer: str, targets: Sequence[int], sources: Sequence[int], lengths: Sequence[int]) -> bool:
        """Reads ranges of a peer's memory; returns whether all of them came. Other threads run meanwhile.

        When it fails, some ranges may still be on their way: bytes can land in the targets until the patience is over.
        """
        code = self._engine.batch_transfer_sync_read(peer, list(targets), list(sources), list(lengths))
        return code == 0


def installed_version() -> tuple[int, ...] | None:
    """Of whichever build of Mooncake is installed; None if that is unknown."""
    for distribution in _DISTRIBUTIONS:
        try:
            text = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"\d+(\.\d+)*", text)
        return tuple(map(int, numbers.group().split("."))) if numbers else None
    return None


def import_engine() -> Any:  # noqa: ANN401 - a class without types
    """Mooncake's class `TransferEngine`.

    Raises:
        MissingDependencyError: it is not installed, or a library of the system that it needs is missing.
    """
    try:
        return importlib.import_module("mooncake.engine").TransferEngine
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"P2P needs Mooncake's transfer engine ({error}): {_ALTERNATIVES}") from error
    except ImportError as error:
        raise MissingDependencyError(
            f"Mooncake's transfer engine is installed but cannot be loaded: {error}. RDMA libraries: apt-get install "
            f"libibverbs1 librdmacm1. CUDA libraries: the build does not fit this machine; {_ALTERNATIVES}"
        ) from error


def _set_defaults(patience: float) -> None:
    """Mooncake reads its settings from the environment; what the user has set stays."""
    seconds = str(max(1, round(patience)))
    for variable, value in (
        ("MC_TRANSFER_TIMEOUT", seconds),
        ("MC_TCP_PROGRESS_TIMEOUT_SEC", seconds),
        ("MC_TCP_STATUS_TIMEOUT_SEC", seconds),
        ("MC_HANDSHAKE_CONNECT_TIMEOUT", str(int(limits.CONNECT))),
        ("MC_LOG_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(variable, value)
