"""A rank's side of the control plane: asks the hub, mirrors what was posted and who is lost, shows that it lives."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import secrets
import socket
import threading

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from checkpoint_engine import limits
from checkpoint_engine.collective.meeting import Meeting
from checkpoint_engine.collective.rank_messages import (
    NO_MESSAGE,
    RANK_PROTOCOL,
    Beat,
    Bye,
    Call,
    FromHub,
    FromSpoke,
    Greet,
    Lost,
    Posted,
    RankReply,
    RankRequest,
    Refused,
    Returned,
    Welcome,
)
from checkpoint_engine.collective.sockets import Pulse, Wake, prepare
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import AccessRefusedError, CheckpointEngineError, DeadlineError, RankError, SettingError

__all__ = ["PendingRequest", "Spoke"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_TICK_SECONDS = 0.1
_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_LINGER_MILLISECONDS = 500


class PendingRequest:
    """A request whose answer has not come yet."""

    def __init__(self, request: RankRequest) -> None:
        self.request = request
        self._answer: list[bytes] = []
        self._event = threading.Event()

    def settle(self, answer: list[bytes]) -> None:
        """The answer has come."""
        self._answer = answer
        self._event.set()

    def wait(self, seconds: float) -> list[bytes] | None:
        """The answer, or None if it does not come in time."""
        return self._answer if self._event.wait(seconds) else None


class Spoke:
    """Lives in a thread of its own, which does nothing but read, write and wait with a limit. For any threads."""

    def __init__(self, meeting: Meeting, rank: int, world_size: int) -> None:
        """Begins to look for the hub; whoever waits for an answer waits for that too, with a deadline."""
        self._meeting = meeting
        self._greet = Greet(RANK_PROTOCOL, rank, world_size, secrets.token_hex(8), os.getpid(), socket.gethostname())
        self._numbers = itertools.count(1)
        self._pending: dict[int, PendingRequest] = {}
        self._seen: list[int] = []
        self._hub_leaves = False
        self._outbox: queue.SimpleQueue[PendingRequest] = queue.SimpleQueue()
        self._wake = Wake()
        self._closing = threading.Event()
        self._welcome = threading.Event()
        self._greeted = False
        """Whether the hub has greeted this rank over the connection that there is, and so told all that was posted."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromHub)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.posts: dict[str, bytes] = {}
        """What was posted, as far as it is known here."""
        self.lost: dict[int, str] = {}
        """Ranks that are gone or do not live, and why one thinks so."""
        self.trouble: CheckpointEngineError = RankError("it is being looked for")
        """Why the hub was not reached so far."""
        self._pulse = Pulse()
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine-spoke", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the hub has taken this rank."""
        return self._welcome.is_set()

    def wait_until_connected(self, deadline: Deadline, cancel: Cancel) -> None:
        """Waits until the hub has taken this rank.

        Raises:
            DeadlineError: it has not in time.
            SettingError: it never will.
            CheckpointEngineError: the cause with which `cancel` was set meanwhile.
        """
        while not self._welcome.wait(min(_TICK_SECONDS, deadline.remaining)):
            cancel.check()
            self.check(deadline)

    def check(self, deadline: Deadline) -> None:
        """Raises what there is to say about the hub, if it was not reached and it is no use to wait on.

        Raises:
            DeadlineError: the time is over.
            SettingError: it cannot be reached as things are set.
        """
        if self.connected:
            return
        if isinstance(self.trouble, SettingError | AccessRefusedError):
            raise self.trouble
        if deadline.expired:
            greet = self._greet
            raise DeadlineError(
                f"rank {greet.rank} of {greet.world_size} (RANK, WORLD_SIZE) did not reach rank 0 at "
                f"{self._meeting.where} within {deadline.said}: {self.trouble}; rank 0 is to run with the same "
                "MASTER_ADDR and MASTER_PORT, and one rank alone with WORLD_SIZE=1"
            )

    def ask(
        self, call: Call, key: str, *frames: bytes, members: tuple[int, ...] = (), amount: int = 0
    ) -> PendingRequest:
        """Sends a request; it is sent again if the connection breaks."""
        pending = PendingRequest(RankRequest(next(self._numbers), call, key, members, amount, frames))
        self._pending[pending.request.number] = pending
        self._outbox.put(pending)
        self._wake.up()
        return pending

    def give_up(self, pending: PendingRequest) -> None:
        """Nobody waits for this answer any more."""
        self._pending.pop(pending.request.number, None)

    def close(self) -> None:
        """Says goodbye, and ends."""
        self._closing.set()
        self._wake.up()
        self._thread.join(limits.BOARD_LEAVE)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                hub = prepare(self._context.socket(zmq.DEALER))
                hub.immediate = True  # what was asked before a break goes over the next connection after its greeting
                hub.routing_id = f"{self._greet.rank}-{self._greet.session}".encode()
                events = hub.get_monitor_socket(_EVENTS)
                try:
                    self._meeting.approach(hub)
                    self._talk(hub, events)
                except (CheckpointEngineError, OSError) as error:
                    self.trouble = error if isinstance(error, CheckpointEngineError) else RankError(str(error))
                finally:
                    hub.disable_monitor()
                    events.close()
                    hub.close(0 if 0 in self.lost or not self.connected else _LINGER_MILLISECONDS)
                self._closing.wait(_POLL_SECONDS)
        except zmq.ZMQError:
            logger.exception("the connection to rank 0 has failed")
            self.lost[0] = "cannot be talked to: see the log"
        finally:
            self._context.term()
            self._wake.close()

    def _talk(self, hub: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        """Until this rank leaves; or until it looks elsewhere, since nobody has taken it here."""
        poller = zmq.Poller()
        for readable in (hub, events, self._wake.descriptor):
            poller.register(readable, zmq.POLLIN)
        patience, next_beat = Deadline(limits.EXPLANATION), Deadline(0.0)
        while not self._closing.is_set() and (self.connected or not patience.expired):
            ready = dict(poller.poll(next_beat.milliseconds(limits.BEAT * 1e3)))
            if events in ready:
                self._note_connections(hub, events)
            if hub in ready:
                self._read_all(hub)
            if self._wake.descriptor in ready:
                self._wake.clear()
            self._send_outbox(hub)
            if self.connected and next_beat.expired:
                next_beat = Deadline(limits.BEAT)
                self._send(hub, Beat(self._told_seen()))
                self._check_pulse()
        if self._closing.is_set() and self.connected:
            self._send(hub, Bye())
        elif not self.connected:
            raise self.trouble

    def _note_connections(self, hub: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        while events.poll(0):
            self._greeted = False
            if int(recv_monitor_message(events)["event"]) == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._send(hub, self._greet)
            elif self.connected and 0 not in self.lost:
                self.lost[0] = self._pulse.describe()

    def _check_pulse(self) -> None:
        if 0 not in self.lost and self._pulse.silence > limits.HUNG:
            self.lost[0] = f"is hung: it does nothing since {self._pulse.silence:.0f} s, but lives"

    def _send_outbox(self, hub: zmq.Socket[bytes]) -> None:
        if self._greeted:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._send_request(hub, self._outbox.get_nowait())

    def _send_request(self, hub: zmq.Socket[bytes], pending: PendingRequest) -> None:
        if pending.request.number in self._pending:
            self._send(hub, msgspec.structs.replace(pending.request, seen=self._told_seen()))

    def _told_seen(self) -> tuple[int, ...]:
        """Replies that came since the last message: a message for each of them would be one more in a gathering."""
        seen = tuple(self._seen)
        self._seen.clear()
        return seen

    def _send(self, hub: zmq.Socket[bytes], message: FromSpoke) -> None:
        with contextlib.suppress(zmq.Again):  # there is no connection; what matters is sent again over the next
            hub.send(self._encoder.encode(message), zmq.NOBLOCK, copy=False)

    def _read_all(self, hub: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                parts = hub.recv_multipart(zmq.NOBLOCK)
                try:
                    header, *frames = parts
                    self._take(hub, self._decoder.decode(header), frames)
                except NO_MESSAGE as error:
                    logger.warning("rank 0 sent what is no message: %s", error)

    def _take(self, hub: zmq.Socket[bytes], message: FromHub, frames: list[bytes]) -> None:
        self._pulse.felt()
        self.lost.pop(0, None)
        match message:
            case Welcome():
                self._begin(hub)
            case Refused(reason):
                self.trouble = RankError(reason)
            case RankReply(number, inside):
                self._settle(hub, number, frames if inside is None else list(inside))
            case Posted(key):
                self.posts[key] = frames[0]
            case Lost(ranks):
                self.lost.update((rank, reason.removeprefix(f"rank {rank} ")) for rank, reason in ranks)
            case Returned(rank):
                self.lost.pop(rank, None)
            case Bye():
                self.lost[0] = "has left"
            case Beat(answer=answer):
                self._hub_leaves |= answer
                self._tell_what_it_waits_for(hub)

    def _settle(self, hub: zmq.Socket[bytes], number: int, answer: list[bytes]) -> None:
        self._seen.append(number)
        if (pending := self._pending.pop(number, None)) is not None:
            pending.settle(answer)
        self._tell_what_it_waits_for(hub)

    def _tell_what_it_waits_for(self, hub: zmq.Socket[bytes]) -> None:
        if self._hub_leaves:
            self._send(hub, Beat(self._told_seen()))

    def _begin(self, hub: zmq.Socket[bytes]) -> None:
        """For the first time, or after a break: what was asked is asked again."""
        self._welcome.set()
        self._greeted = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._outbox.get_nowait()  # it is pending, too
        for pending in list(self._pending.values()):
            self._send(hub, pending.request)
