"""The devices of this process under the names that existing users import."""

from __future__ import annotations

import fcntl
import socket
import struct
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from checkpoint_engine.device import default_type
from checkpoint_engine.errors import SettingError

__all__ = ["DeviceManager", "get_ip", "npu_generate_uuid"]

_GET_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR
_ROUTE_IS_UP = 0x1
_GLOBAL_SCOPE = "00"


class DeviceManager:
    """What type of device this process uses: CUDA where there is one, else the CPU."""

    device_type: str
    """`cuda` or `cpu`."""

    device_module: ModuleType
    """The module of torch for it."""

    def __init__(self) -> None:
        self._type = default_type()
        self.device_type = self._type.name
        self.device_module = getattr(torch, self.device_type)

    @property
    def backend(self) -> str:
        """The collective backend that moves this device's tensors."""
        return self._type.backend


@lru_cache(maxsize=1)
def get_ip() -> str:
    """An address under which other hosts reach this one, read from the kernel's tables: no packet is sent.

    The address of the interface with the default route; else of any interface that is up; else `127.0.0.1`.
    """
    for interface in [*_default_route_interfaces(), *_other_interfaces()]:
        address = _address_of(interface)
        if address is not None:
            return address
    return _global_ipv6_address() or "127.0.0.1"


def npu_generate_uuid() -> str:
    """Kept for importers; Ascend NPUs are not supported.

    Raises:
        SettingError: always.
    """
    raise SettingError("Ascend NPUs are not supported by checkpoint-engine-core; devices are cuda and cpu")


def _default_route_interfaces() -> list[str]:
    routes: list[tuple[int, str]] = []
    for line in _lines("/proc/net/route")[1:]:
        interface, destination, _, flags, _, _, metric, mask, *_ = line.split()
        if int(destination, 16) == int(mask, 16) == 0 and int(flags, 16) & _ROUTE_IS_UP:
            routes.append((int(metric), interface))
    return [interface for _, interface in sorted(routes)]


def _other_interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name != "lo"]


def _address_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _GET_INTERFACE_ADDRESS, request)
        except OSError:  # it has no IPv4 address
            return None
    return socket.inet_ntoa(answer[20:24])


def _global_ipv6_address() -> str | None:
    for line in _lines("/proc/net/if_inet6"):
        address, _, _, scope, _, interface = line.split()
        if scope == _GLOBAL_SCOPE and interface != "lo":
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
