"""Attaches file descriptors to every byte of its greeting, hoping that the rank runs out of its own."""

import contextlib
import socket
from pathlib import Path

from victim import attack_before_token, framed, knocking, wait_for_hang_up


def attack(path: str) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with knocking(path) as connection:
        with contextlib.suppress(ConnectionError):
            for byte in framed(bytes(4000)):
                socket.send_fds(connection, [bytes([byte])], [0] * 15)
        wait_for_hang_up(connection)
    left_open = len(list(Path("/proc/self/fd").iterdir())) - open_before
    if left_open > 2:
        raise SystemExit(f"NOT REFUSED: {left_open} descriptors stay open")


attack_before_token(attack)
