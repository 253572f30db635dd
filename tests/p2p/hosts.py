"""Several hosts on one machine: network namespaces with a switch between them."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

from typing_extensions import Self

_numbers = itertools.count()


def why_not() -> str:
    """Why this machine cannot make network namespaces; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    name = f"ce-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    bridge = ["ip", "-n", name, "link", "add", "probe", "type", "bridge"]
    bridged = subprocess.run(bridge, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return "" if bridged.returncode == 0 else f"this machine makes no bridges: {bridged.stderr.strip()}"


class Network:
    """`count` hosts at 10.201.N.1, .2 and so on, each with a network namespace of its own."""

    def __init__(self, count: int) -> None:
        number = next(_numbers)
        self._names: list[str] = []
        self._stem = f"ce-{os.getpid()}-{number}"
        self._net = f"10.201.{(os.getpid() + number) % 250}"
        try:
            self._make(count)
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        return f"{self._net}.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command, on that host."""
        return ["ip", "netns", "exec", self._names[1 + host], *command]

    def close(self) -> None:
        for name in self._names:
            _ip("netns", "del", name)
        self._names = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self, count: int) -> None:
        switch = self._add("switch")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(count):
            name = self._add(f"host{host}")
            _ip("-n", switch, "link", "add", f"port{host}", "type", "veth", "peer", "name", "net0", "netns", name)
            _ip("-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _add(self, what: str) -> str:
        name = f"{self._stem}-{what}"
        _ip("netns", "add", name)
        self._names.append(name)
        return name


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
