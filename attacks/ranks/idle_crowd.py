"""Opens three hundred connections to rank 0 and says nothing, hoping that there is no place left for rank 1."""

import contextlib
import socket

from victim import attack

crowd: list[socket.socket] = []


def crowd_in(address: str, port: int) -> str:
    for _ in range(300):
        with contextlib.suppress(OSError):
            crowd.append(socket.create_connection((address, port), timeout=1.0))
    return f"{len(crowd)} idle connections"


attack(crowd_in, between_hosts=True)
for connection in crowd:
    connection.close()
