"""Hears events, asks for those that it missed, and hands them out in order and once each."""

from __future__ import annotations

from collections import deque
from types import TracebackType

import msgspec
import zmq
from typing_extensions import Self

from checkpoint_engine import limits
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.events.messages import TOPIC, Event, decode_event, pack_number, replay_address, unpack_number

__all__ = ["EventSubscriber"]

_POLL_MILLISECONDS = 200
_LARGEST_EVENT = 1 << 20


class EventSubscriber:
    """One subscription. Not for several threads."""

    def __init__(self, address: str, *, history: bool = False) -> None:
        """Subscribes to what is published at `tcp://HOST:PORT` or `ipc:///PATH`, now or later.

        Args:
            address: As the publisher has it.
            history: Whether events come first that were published before, as far as the publisher remembers them.

        Raises:
            SettingError: it is no address.
        """
        self._replay = replay_address(address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _connected(self._context, zmq.SUB, address)
        self._socket.subscribe(TOPIC)
        self._ready: deque[Event] = deque()
        self._session = ""
        self._expected = 0 if history else None
        self.missed = 0
        """Events that were published and could not be had any more."""
        if history:
            self._catch_up(0)

    def receive(self, deadline: Deadline) -> Event:
        """Waits for the next event.

        Raises:
            DeadlineError: none came in time.
        """
        while not self._ready:
            if self._socket.poll(deadline.milliseconds(_POLL_MILLISECONDS)):
                self._take(self._socket.recv_multipart())
            else:
                deadline.check("an event")
        return self._ready.popleft()

    def close(self) -> None:
        """Ends the subscription."""
        self._context.destroy(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, frames: list[bytes]) -> None:
        read = _read(frames)
        if read is None:
            return
        number, event = read
        if event.session != self._session:
            # Of a publisher that was started again, all is new.
            expected = number if self._expected is None else 0
            self._session, self._expected = event.session, expected
        if self._expected is not None and number > self._expected:
            self._catch_up(self._expected)
        self._hand_out(number, event)

    def _catch_up(self, first: int) -> None:
        """Asks for events from a number on, and takes what there is."""
        asking = _connected(self._context, zmq.DEALER, self._replay)
        try:
            asking.send(pack_number(first))
            deadline = Deadline(limits.KNOCK)
            while asking.poll(deadline.milliseconds()):
                read = _read(asking.recv_multipart())
                if read is None:
                    return
                number, event = read
                self._session = self._session or event.session
                if event.session == self._session:
                    self._hand_out(number, event)
        finally:
            asking.close(0)

    def _hand_out(self, number: int, event: Event) -> None:
        expected = number if self._expected is None else self._expected
        if number >= expected:
            self.missed += number - expected
            self._expected = number + 1
            self._ready.append(event)


def _connected(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.ipv6 = "[" in address
    socket.maxmsgsize = _LARGEST_EVENT
    socket.connect(address)
    return socket


def _read(frames: list[bytes]) -> tuple[int, Event] | None:
    """Number and event; None for the end of a replay, and for what is neither."""
    try:
        _, number, payload = frames
        return unpack_number(number), decode_event(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
