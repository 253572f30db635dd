"""Sends what is no MessagePack, or no message, or of another protocol altogether."""

import contextlib

import msgspec
from victim import attack_before_token, framed, knocking, wait_for_hang_up

GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    framed(b"\xc1" * 100),
    framed(b"\xdf\xff\xff\xff\xff"),
    framed(msgspec.msgpack.encode({"type": "Hello", "token": ["not", "text"]})),
    framed(b"\x82\xa4type\xa5Hello\xa5token\xa2\xff\xfe"),
)


def attack(path: str) -> None:
    for garbage in GARBAGE:
        with knocking(path) as connection:
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(garbage)
            wait_for_hang_up(connection)


attack_before_token(attack)
