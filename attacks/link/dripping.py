"""Sends its greeting one byte every 50 milliseconds, so that something always happens."""

import contextlib
import time

from victim import attack_before_token, framed, knocking


def attack(path: str) -> None:
    with knocking(path) as connection, contextlib.suppress(ConnectionError):
        for byte in framed(bytes(4000)):
            connection.send(bytes([byte]))
            time.sleep(0.05)


attack_before_token(attack)
