"""What both ends of the control plane do with their sockets."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import zmq

from checkpoint_engine import limits

__all__ = ["Pulse", "Wake", "prepare"]

_LARGEST_MESSAGE = 1 << 32


def prepare(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """Bounds what a stranger can cost, and has ZeroMQ find out within `limits.SILENCE` that the other side is lost.

    ZeroMQ answers for a process whose Python does nothing, but not for one that is stopped.
    """
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0
    socket.maxmsgsize = _LARGEST_MESSAGE
    socket.handshake_ivl = _milliseconds(limits.GREETING)
    socket.heartbeat_ivl = _milliseconds(limits.BEAT)
    socket.heartbeat_timeout = _milliseconds(limits.SILENCE - limits.BEAT)
    # Else the kernel tries for two minutes, ever more rarely: a host that is back would not be noticed.
    socket.connect_timeout = _milliseconds(limits.RANK_CONNECT)
    socket.reconnect_ivl = 50
    socket.reconnect_ivl_max = _milliseconds(limits.BEAT)
    return socket


def _milliseconds(seconds: float) -> int:
    return round(1e3 * seconds)


class Pulse:
    """When the other side was heard last."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def felt(self) -> None:
        """It was heard now."""
        self._last = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self._last

    def describe(self) -> str:
        """What it means that the connection has closed: a process that dies closes it at once."""
        if self.silence > (limits.BEAT + limits.SILENCE) / 2:
            return f"gave no sign of life for {self.silence:.0f} s: it is stopped, or its host is lost"
        return "is gone: its connection has closed"


class Wake:
    """Makes a thread that polls look up."""

    def __init__(self) -> None:
        self._descriptors = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def descriptor(self) -> int:
        """What the thread polls."""
        return self._descriptors[0]

    def up(self) -> None:
        """Wakes it; does nothing if it has ended."""
        with self._lock, contextlib.suppress(BlockingIOError):  # it is awake
            if not self._closed:
                os.write(self._descriptors[1], b"\0")

    def clear(self) -> None:
        """It is awake."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptors[0], 4096)

    def close(self) -> None:
        """Frees it."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for descriptor in self._descriptors:
                    os.close(descriptor)
