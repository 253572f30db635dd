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
_DROP = "4,32 0 0 4294963256,37 1 0 {share},6 0 0 2,6 0 0 0"
"""Classic BPF: a random word; where it is not above `share`, the packet is shot (2), else it goes on (0)."""


def why_not() -> str:
    """Why this machine cannot make network namespaces; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need the commands ip and tc (iproute2)"
    name = f"ce-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    bridge = ["ip", "-n", name, "link", "add", "probe", "type", "bridge"]
    bridged = subprocess.run(bridge, capture_output=True, text=True, check=False)
    ingress = ["tc", "-n", name, "qdisc", "add", "dev", "lo", "clsact"]
    filtered = subprocess.run(ingress, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)
    if bridged.returncode != 0:
        return f"this machine makes no bridges: {bridged.stderr.strip()}"
    return "" if filtered.returncode == 0 else f"this machine filters no packets: {filtered.stderr.strip()}"


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

    def pull(self, host: int) -> None:
        """The host's cable."""
        self._set(host, "down")

    def plug(self, host: int) -> None:
        """It in again."""
        self._set(host, "up")

    def drop(self, host: int, share: float) -> None:
        """That share of the packets to and from a host goes astray, by chance; the link stays up."""
        for direction in ("ingress", "egress"):
            _tc("-n", self._names[0], "filter", "delete", "dev", f"port{host}", direction)
            if share:
                program = _DROP.format(share=round(share * 0xFFFFFFFF))
                filtered = ("filter", "add", "dev", f"port{host}", direction, "bpf", "direct-action")
                _tc("-n", self._names[0], *filtered, "bytecode", program)

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
            _tc("-n", switch, "qdisc", "add", "dev", f"port{host}", "clsact")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _set(self, host: int, state: str) -> None:
        _ip("-n", self._names[0], "link", "set", f"port{host}", state)

    def _add(self, what: str) -> str:
        name = f"{self._stem}-{what}"
        _ip("netns", "add", name)
        self._names.append(name)
        return name


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _tc(*arguments: str) -> None:
    subprocess.run(["tc", *arguments], check=True, capture_output=True)
