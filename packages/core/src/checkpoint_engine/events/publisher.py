"""Publishes events by ZeroMQ, and sends the last ones again to whoever missed them."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
from collections import deque
from pathlib import Path

import msgspec
import zmq

from checkpoint_engine import limits
from checkpoint_engine.collective.sockets import Wake
from checkpoint_engine.errors import AddressInUseError
from checkpoint_engine.events.messages import TOPIC, Event, pack_number, replay_address, unpack_number

__all__ = ["EventPublisher"]

_REMEMBERED = 1000
"""Events that can be sent again."""
_LINGER_MILLISECONDS = 500
_LOOK_MILLISECONDS = 1000
_LARGEST_REQUEST = 1024


class EventPublisher:
    """Its own thread writes: `publish` never waits, for no subscriber. A slow one loses events, and asks for them."""

    def __init__(self, address: str) -> None:
        """Binds `tcp://HOST:PORT` and the next port, or `ipc:///PATH` and `PATH.replay` with mode 0600.

        Raises:
            SettingError: it is no such address.
            AddressInUseError: it is taken, or not of this host.
        """
        self.session = secrets.token_hex(8)
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=_REMEMBERED)
        self._next = 0
        self._closing = False
        replay = replay_address(address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publishing = _bound(self._context, zmq.PUB, address)
        self._replaying = _bound(self._context, zmq.ROUTER, replay)
        self._files = [(path, path.stat().st_ino) for each in (address, replay) if (path := _path_of(each)) is not None]
        self._wake = Wake()
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine-events", daemon=True)
        self._thread.start()

    def publish(self, event: Event) -> None:
        """Tells all subscribers, soon."""
        self._queue.put(event)
        self._wake.up()

    def close(self) -> None:
        """Sends what is left, and ends."""
        self._closing = True
        self._wake.up()
        self._thread.join(limits.BOARD_LEAVE)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake.descriptor, zmq.POLLIN)
        poller.register(self._replaying, zmq.POLLIN)
        try:
            while not self._closing:
                ready = dict(poller.poll(_LOOK_MILLISECONDS))
                self._wake.clear()
                self._send_all()
                if self._replaying in ready:
                    self._answer_all()
            self._send_all()
        finally:
            self._replaying.close(_LINGER_MILLISECONDS)
            self._publishing.close(_LINGER_MILLISECONDS)
            self._context.term()
            self._wake.close()
            for path, inode in self._files:
                with contextlib.suppress(OSError):  # it is gone
                    if path.stat().st_ino == inode:  # else another publisher has taken its place
                        path.unlink()

    def _send_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                payload = msgspec.msgpack.encode(self._queue.get_nowait())
                self._sent.append((self._next, payload))
                self._publishing.send_multipart([TOPIC, pack_number(self._next), payload])  # PUB drops, and never waits
                self._next += 1

    def _answer_all(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                identity, *frames = self._replaying.recv_multipart(zmq.NOBLOCK)
                with contextlib.suppress(ValueError):  # whoever asks for anything else is not answered
                    self._answer(identity, unpack_number(frames[-1] if frames else b""))

    def _answer(self, identity: bytes, first: int) -> None:
        """Sends what is remembered from that number on; ROUTER drops what a peer does not read."""
        with contextlib.suppress(zmq.ZMQError):
            for number, payload in self._sent:
                if number >= first:
                    self._replaying.send_multipart([identity, TOPIC, pack_number(number), payload], zmq.NOBLOCK)
            self._replaying.send_multipart([identity, TOPIC, pack_number(-1), b""], zmq.NOBLOCK)


def _bound(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.ipv6 = "[" in address
    if kind == zmq.ROUTER:
        socket.maxmsgsize = _LARGEST_REQUEST
        socket.sndhwm = 2 * _REMEMBERED
    mask = os.umask(0o177) if _path_of(address) is not None else None
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        context.destroy(0)
        raise AddressInUseError(
            f"cannot publish events at {address}: {error.strerror}; choose another address"
        ) from error
    finally:
        if mask is not None:
            os.umask(mask)
    return socket


def _path_of(address: str) -> Path | None:
    """Of the socket in the file system, if it is one."""
    return Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None
