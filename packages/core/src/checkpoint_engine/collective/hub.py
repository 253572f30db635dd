"""Rank 0's side of the control plane: answers all ranks, and tells them who is lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Sequence

import msgspec
import zmq
from zmq.utils import z85

from checkpoint_engine import limits
from checkpoint_engine.collective.ledger import Ledger
from checkpoint_engine.collective.meeting import Meeting
from checkpoint_engine.collective.rank_messages import (
    NO_MESSAGE,
    RANK_PROTOCOL,
    Beat,
    Bye,
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
from checkpoint_engine.deadline import Deadline

__all__ = ["Hub"]

logger = logging.getLogger(__name__)

_THREADS = 4
"""Connections are encrypted by so many threads at most."""
_LINGER_MILLISECONDS = 500
_WITHIN = 4096
"""Bytes of an answer that goes into the message about it: copied for each rank, but one frame less for each."""
_AT_ONCE = 4096
"""Messages that are read before others are told who was lost, and that this hub lives."""
_MORE, _LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)
"""Plain numbers: combining flags costs as much as sending."""


class _Peer:
    """A rank as the hub knows it."""

    def __init__(self, greet: Greet, identity: bytes) -> None:
        self.greet = greet
        self.identity = identity
        self.pulse = Pulse()
        self.open: set[int] = set()
        """Requests that were taken and not answered yet."""
        self.unseen: dict[int, list[bytes]] = {}
        """Answers of which the rank has not said that it has them."""
        self.lost = ""
        self.left = False

    @property
    def name(self) -> str:
        return f"rank {self.greet.rank} (pid {self.greet.process} on {self.greet.host})"


class Hub:
    """Lives in a thread of its own, which does nothing but read, write and wait with a limit."""

    def __init__(self, meeting: Meeting, world_size: int) -> None:
        """Opens the meeting.

        Raises:
            AddressInUseError: the place is taken.
            SettingError: it cannot be opened here.
        """
        self._meeting = meeting
        self._world_size = world_size
        self._ledger = Ledger(world_size)
        self._peers: dict[int, _Peer] = {}
        self._by_identity: dict[bytes, _Peer] = {}
        self._news: dict[int, str] = {}
        """Ranks that are lost, of which the others have not been told."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromSpoke)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_THREADS)
        self._guard = self._context.socket(zmq.REP)  # of who may connect: ZeroMQ asks at this address
        self._guard.bind("inproc://zeromq.zap.01")
        self._socket = prepare(self._context.socket(zmq.ROUTER))
        self._socket.router_mandatory = True  # a rank whose connection has closed is seen as soon as it is written to
        self._socket.router_handover = True
        self._wake = Wake()
        self._leaving: Deadline | None = None
        try:
            self._keys = meeting.listen(self._socket)
        except BaseException:
            self._free()
            raise
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets the ranks read what they came for, and ends."""
        if self._thread.is_alive():
            self._leaving = Deadline(limits.BOARD_LEAVE)
            self._wake.up()
            self._thread.join(2 * limits.BOARD_LEAVE)

    def _run(self) -> None:
        poller = zmq.Poller()
        for readable in (self._socket, self._guard, self._wake.descriptor):
            poller.register(readable, zmq.POLLIN)
        next_beat = Deadline(limits.BEAT)
        try:
            while not self._over():
                ready = dict(poller.poll(next_beat.milliseconds(10 if self._leaving else limits.BEAT * 1e3)))
                if self._wake.descriptor in ready:
                    self._wake.clear()
                    self._tell_all(Beat(answer=True))
                if self._guard in ready:
                    self._admit()
                if self._socket in ready:
                    self._read_all()
                if next_beat.expired:
                    next_beat = Deadline(limits.BEAT)
                    self._beat()
                self._tell_news()
            self._tell_all(Bye())
        except zmq.ZMQError:
            logger.exception("the hub of the ranks has failed")
        finally:
            self._free()

    def _over(self) -> bool:
        if self._leaving is None:
            return False
        waiting = any(peer.unseen for peer in self._peers.values() if not (peer.left or peer.lost))
        return not waiting or self._leaving.expired

    def _free(self) -> None:
        self._guard.close(0)
        self._socket.close(_LINGER_MILLISECONDS)
        self._meeting.close()
        self._context.term()
        self._wake.close()

    def _admit(self) -> None:
        """Says of a connection whether its key is that of the ranks (ZAP, ZeroMQ's own protocol for this)."""
        version, number, *_, mechanism, key = self._guard.recv_multipart()[:7]
        known = mechanism == b"CURVE" and key == z85.decode(self._keys.rank_public)
        verdict = [b"200", b"OK", b"rank", b""] if known else [b"400", b"not a rank", b"", b""]
        self._guard.send_multipart([version, number, *verdict])

    def _read_all(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_AT_ONCE):
                identity, *parts = self._socket.recv_multipart(_LAST)
                try:
                    self._take(identity, self._decoder.decode(parts[0]))
                except NO_MESSAGE as error:
                    logger.warning("a rank sent what is no message: %s", error)

    def _take(self, identity: bytes, message: FromSpoke) -> None:
        if isinstance(message, Greet):
            self._greet(identity, message)
            return
        peer = self._by_identity.get(identity)
        if peer is None:
            return
        self._heard(peer)
        if isinstance(message, Bye):
            peer.left = True
            self._news[peer.greet.rank] = f"{peer.name} has left"
            return
        for number in message.seen:
            peer.unseen.pop(number, None)
        if isinstance(message, RankRequest):
            self._answer(peer, message)

    def _greet(self, identity: bytes, greet: Greet) -> None:
        peer = self._peers.get(greet.rank)
        refusal = self._why_not(greet, peer)
        if refusal:
            self._write(identity, Refused(refusal))
            return
        if peer is None:
            peer = self._peers[greet.rank] = self._by_identity[identity] = _Peer(greet, identity)
        self._heard(peer)
        for key, text in self._ledger.posts.items():
            self._send(peer, Posted(key), [text])
        if lost := tuple((other.greet.rank, other.lost) for other in self._peers.values() if other.lost):
            self._send(peer, Lost(lost))
        self._send(peer, Welcome())

    def _why_not(self, greet: Greet, peer: _Peer | None) -> str:
        if greet.protocol != RANK_PROTOCOL:
            return f"rank 0 speaks protocol {RANK_PROTOCOL} with ranks, rank {greet.rank} {greet.protocol}"
        if greet.world_size != self._world_size or not 0 <= greet.rank < self._world_size:
            return f"rank 0 is one of {self._world_size} ranks, rank {greet.rank} one of {greet.world_size}"
        if peer is not None and peer.greet.session != greet.session:
            return (
                f"rank 0 knows {peer.name} already, and this is another: two runs share a MASTER_PORT, or one rank was "
                "started again by itself; start all ranks again"
            )
        return ""

    def _heard(self, peer: _Peer) -> None:
        peer.pulse.felt()
        if peer.lost:
            peer.lost = ""
            self._news.pop(peer.greet.rank, None)
            self._tell_all(Returned(peer.greet.rank))

    def _answer(self, peer: _Peer, request: RankRequest) -> None:
        if request.number in peer.unseen:
            self._reply(peer, request.number, peer.unseen[request.number])
        elif request.number not in peer.open:
            peer.open.add(request.number)
            posts = len(self._ledger.posts)
            for rank, number, answer in self._ledger.take(peer.greet.rank, request, request.frames):
                receiver = self._peers[rank]
                receiver.open.discard(number)
                receiver.unseen[number] = answer
                self._reply(receiver, number, answer)
            if len(self._ledger.posts) > posts:
                self._tell_all(Posted(request.key), [self._ledger.posts[request.key]])

    def _reply(self, peer: _Peer, number: int, answer: list[bytes]) -> None:
        if sum(map(len, answer)) <= _WITHIN:
            self._send(peer, RankReply(number, tuple(answer)))
        else:
            self._send(peer, RankReply(number), answer)

    def _beat(self) -> None:
        for peer in list(self._peers.values()):
            self._send(peer, Beat())
            if not peer.left and not peer.lost and peer.pulse.silence > limits.HUNG:
                self._lose(peer, f"{peer.name} is hung: it does nothing since {peer.pulse.silence:.0f} s, but lives")

    def _lose(self, peer: _Peer, reason: str) -> None:
        peer.lost = reason
        self._news[peer.greet.rank] = reason

    def _tell_news(self) -> None:
        """Who was lost since: of ranks that leave together one message, not one for each to each."""
        while self._news:
            news, self._news = self._news, {}
            self._tell_all(Lost(tuple(news.items())))

    def _tell_all(self, message: FromHub, frames: Sequence[bytes] = ()) -> None:
        for peer in list(self._peers.values()):
            if not peer.left:
                self._send(peer, message, frames)

    def _send(self, peer: _Peer, message: FromHub, frames: Sequence[bytes] = ()) -> None:
        if not self._write(peer.identity, message, frames) and not peer.left and not peer.lost:
            self._lose(peer, f"{peer.name} {peer.pulse.describe()}")

    def _write(self, identity: bytes, message: FromHub, frames: Sequence[bytes] = ()) -> bool:
        """Whether there is a connection to send it by."""
        try:
            self._socket.send(identity, _MORE)
            self._socket.send(self._encoder.encode(message), _MORE if frames else _LAST)
            for index, frame in enumerate(frames, 1):
                self._socket.send(frame, _MORE if index < len(frames) else _LAST, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            return False
        return True
