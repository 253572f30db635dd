"""Ranks on hosts of their own, told what to do."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.core.p2p_processes import ENVIRONMENT
from tests.p2p.hosts import Network

REPOSITORY = Path(__file__).parents[2]
_ENVIRONMENT = {name: value for name, value in ENVIRONMENT.items() if name != "CHECKPOINT_ENGINE_P2P_HOST"} | {
    "GLOO_SOCKET_IFNAME": "net0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
}


class Said(NamedTuple):
    """What came of an order."""

    seconds: float
    words: str


class RankOnHost:
    """A process of `host_rank`."""

    def __init__(self, network: Network, host: int, rank: int, world_size: int, secret: str) -> None:
        """On that host; rank 0 is on the first."""
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": network.address(0),
            "MASTER_PORT": "29400",
            "CHECKPOINT_ENGINE_RANKS_SECRET": secret,
        }
        self._process = subprocess.Popen(
            network.command(host, [sys.executable, "-m", "tests.p2p.host_rank"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _ENVIRONMENT | environment,
        )

    def order(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def wait_until_it_loads(self) -> None:
        said = self._line()
        assert said == "loading", said

    def answer(self) -> Said:
        """Of the order that was given last."""
        line = self._line()
        while line == "loading":
            line = self._line()
        seconds, _, words = line.partition(" ")
        return Said(float(seconds), words)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "it has ended"
        return line.strip()


@contextlib.contextmanager
def ranks_on(network: Network, hosts: int) -> Iterator[list[RankOnHost]]:
    """One on each host, all of one parameter server."""
    secret = secrets.token_hex(32)
    with contextlib.ExitStack() as stack:
        ranks: list[RankOnHost] = []
        for host in range(hosts):
            ranks.append(RankOnHost(network, host, host, hosts, secret))
            stack.callback(ranks[-1].end)
        yield ranks


@contextlib.contextmanager
def alone_on(network: Network, hosts: int) -> Iterator[list[RankOnHost]]:
    """One on each host, each a parameter server of its own."""
    with contextlib.ExitStack() as stack:
        ranks: list[RankOnHost] = []
        for host in range(hosts):
            ranks.append(RankOnHost(network, host, 0, 1, ""))
            stack.callback(ranks[-1].end)
        yield ranks


def all_of(ranks: list[RankOnHost], *words: object) -> list[Said]:
    """What came of an order to all of them."""
    for rank in ranks:
        rank.order(*words)
    return [rank.answer() for rank in ranks]
