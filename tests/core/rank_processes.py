"""Ranks as processes that do as they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


class RankProcess:
    """A rank of `rank_process.py`."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def order(self, what: str, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {seconds}\n")
        self._process.stdin.flush()

    def answer(self) -> tuple[float, str]:
        """Seconds that it took, and what came of it."""
        assert self._process.stdout is not None
        seconds, _, said = self._process.stdout.readline().strip().partition(" ")
        return float(seconds), said

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGSTOP:  # all of its threads stand still before anything else happens
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def all_of(chosen: list[RankProcess], what: str, seconds: float) -> list[tuple[float, str]]:
    for rank in chosen:
        rank.order(what, seconds)
    return [rank.answer() for rank in chosen]
