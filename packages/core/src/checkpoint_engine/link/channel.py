"""The control channel between one parameter-server rank and one engine worker.

A Unix stream socket in a directory of mode 0700. The kernel vouches for the peer's user, hands over file
descriptors, and closes the channel the moment the other process dies, so nobody waits for a corpse. Messages are
MessagePack with a length in front; every wait has a deadline and can be cancelled.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import msgspec
from typing_extensions import Self

from checkpoint_engine import limits
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import DeadlineError, LinkClosedError, LinkError, LinkRefusedError, SettingError
from checkpoint_engine.link.messages import PROTOCOL, FromReceiver, FromSender, Hello
from checkpoint_engine.owned_directory import OwnedDirectory

__all__ = ["Channel", "Listener", "ReceiverChannel", "SenderChannel", "connect"]

_HEADER = struct.Struct("!Q")
_CREDENTIALS = struct.Struct("3i")
_DESCRIPTOR = struct.Struct("i")
_LARGEST_MESSAGE = 1 << 30
_LARGEST_HELLO = 1 << 12
"""A stranger may not make us allocate more than this before it has shown its token."""
_MOST_DESCRIPTORS = 253
"""The kernel takes no more in one call; a direct update sends one for each segment."""
_POLL_MS = 100
_MOST_CALLERS = 64
"""Connections that are waited for at a time to say who they are."""
_SCHEME = "ce-link"

_Sent = TypeVar("_Sent")
Received = TypeVar("Received")


class Channel(Generic[_Sent, Received]):
    """One end of a connected channel. Not for use by several threads at once."""

    def __init__(self, connection: socket.socket, receives: object, cancel: Cancel | None = None) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(receives)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._encoder = msgspec.msgpack.Encoder()
        self.cancel = cancel or Cancel()
        self._descriptors: list[int] = []
        self.peer = _check_peer(connection)
        """Number of the process at the other end; 0 if it cannot be seen from here."""

    def send(self, message: _Sent, deadline: Deadline, descriptors: tuple[int, ...] = ()) -> None:
        """Sends one message, with open file descriptors if given; they stay open here.

        Raises:
            LinkClosedError: the other side is gone.
            DeadlineError: it does not read.
        """
        body = self._encoder.encode(message)
        pending = memoryview(_HEADER.pack(len(body)) + body)
        while pending:
            self._wait(select.POLLOUT, deadline, "sending to the other side")
            try:
                if descriptors:
                    sent = socket.send_fds(self._socket, [pending], list(descriptors))
                    descriptors = ()
                else:
                    sent = self._socket.send(pending)
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkClosedError(f"the other side of the link is gone ({error.strerror})") from error
            pending = pending[sent:]
            if pending:  # a peer that reads drop by drop must not hold us longer than one that does not read
                self._check(deadline, "sending to the other side")

    def receive(self, deadline: Deadline, waiting_for: str, *, largest: int = _LARGEST_MESSAGE) -> Received:
        """Waits for the next message.

        Raises:
            LinkClosedError: the other side is gone.
            DeadlineError: nothing came in time.
            LinkError: what came is not a message.
        """
        (length,) = _HEADER.unpack(self._receive_bytes(_HEADER.size, deadline, waiting_for))
        if length > largest:
            raise LinkError(f"a message of {length} bytes was announced, at most {largest} are taken")
        body = self._receive_bytes(length, deadline, waiting_for)
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise LinkError(f"not a message of protocol {PROTOCOL}: {error}") from error

    def fileno(self) -> int:
        """Descriptor of the connection."""
        return self._socket.fileno()

    def ready(self) -> bool:
        """Whether `receive` would find something at once."""
        return bool(_poll(self._socket, select.POLLIN, 0))

    def take_descriptors(self) -> tuple[int, ...]:
        """The file descriptors that came with the messages received so far; the caller closes them."""
        taken, self._descriptors = tuple(self._descriptors), []
        return taken

    def duplicate(self) -> socket.socket:
        """The connection, which then lives on when the channel is closed."""
        return self._socket.dup()

    def close(self) -> None:
        """Closes the channel; the other side notices at once."""
        for descriptor in self.take_descriptors():
            os.close(descriptor)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive_bytes(self, length: int, deadline: Deadline, waiting_for: str) -> bytearray:
        received = bytearray()
        while len(received) < length:
            self._wait(select.POLLIN, deadline, waiting_for)
            try:
                piece = self._receive_piece(min(length - len(received), 1 << 20))
            except BlockingIOError:
                continue
            except LinkError:  # is an OSError too
                raise
            except OSError as error:
                raise LinkClosedError(f"the other side of the link is gone ({error.strerror})") from error
            if not piece:
                raise LinkClosedError(f"the other side closed the link or died; waited for {waiting_for}")
            received += piece
            if len(received) < length:
                self._check(deadline, waiting_for)
        return received

    def _receive_piece(self, most: int) -> bytes:
        # socket.recv_fds ignores its flags, and without this one a child process would inherit what came.
        room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR.size)
        piece, ancillary, flags, _ = self._socket.recvmsg(most, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) // _DESCRIPTOR.size * _DESCRIPTOR.size
                self._descriptors.extend(descriptor for (descriptor,) in _DESCRIPTOR.iter_unpack(data[:whole]))
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > _MOST_DESCRIPTORS:
            raise LinkError(f"more than {_MOST_DESCRIPTORS} file descriptors came over the link")
        return piece

    def _wait(self, event: int, deadline: Deadline, waiting_for: str) -> None:
        while not _poll(self._socket, event, deadline.milliseconds(_POLL_MS)):
            self._check(deadline, waiting_for)

    def _check(self, deadline: Deadline, waiting_for: str) -> None:
        self.cancel.check()
        deadline.check(waiting_for)


SenderChannel = Channel[FromSender, FromReceiver]
ReceiverChannel = Channel[FromReceiver, FromSender]


class Listener:
    """Waits for one engine worker. `handle` tells the worker where to connect, and proves that we told it."""

    def __init__(self, directory: Path | None = None) -> None:
        self._token = secrets.token_urlsafe(32)
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise SettingError(f"cannot open a link: {error.strerror}; raise the limit (ulimit -n)") from error
        try:
            self._directory = OwnedDirectory("link", directory)
        except SettingError:
            self._socket.close()
            raise
        path = self._directory.path / "link"
        try:
            self._socket.bind(str(path))
        except OSError as error:
            self.close()
            raise SettingError(
                f"cannot bind the link at {path}: {error}; set TMPDIR to a short, writable path"
            ) from error
        self._socket.listen()
        self.handle = f"{_SCHEME}://{path}#{self._token}"

    def accept(self, deadline: Deadline, cancel: Cancel, waiting_for: str) -> tuple[SenderChannel, Hello]:
        """Waits for a worker that shows the token; others are turned away and the wait goes on.

        Raises:
            DeadlineError: none came in time.
            LinkRefusedError: the worker holds the token but speaks another protocol.
        """
        callers: dict[SenderChannel, Deadline] = {}
        try:
            while True:
                cancel.check()
                deadline.check(waiting_for)
                self._let_in(callers, cancel, deadline.milliseconds(_POLL_MS))
                for channel in [channel for channel in callers if channel.ready()]:
                    del callers[channel]
                    hello = self._greeting(channel)
                    if hello is not None:
                        return channel, hello
        finally:
            for channel in callers:
                channel.close()

    def _let_in(self, callers: dict[SenderChannel, Deadline], cancel: Cancel, milliseconds: int) -> None:
        """Waits until somebody connects or speaks; who has been silent for too long goes, so that others find room."""
        for channel in [channel for channel, patience in callers.items() if patience.expired]:
            del callers[channel]
            channel.close()
        poller = select.poll()
        for readable in (*callers, *([self._socket] if len(callers) < _MOST_CALLERS else [])):
            poller.register(readable, select.POLLIN)
        found = dict(poller.poll(milliseconds))
        if self._socket.fileno() not in found:
            return
        connection, _ = self._socket.accept()
        try:
            callers[SenderChannel(connection, FromReceiver, cancel)] = Deadline(limits.GREETING)
        except LinkRefusedError:
            connection.close()

    def _greeting(self, channel: SenderChannel) -> Hello | None:
        """That of a worker which shows the token; None of others, which are turned away.

        Raises:
            LinkRefusedError: it holds the token but speaks another protocol.
        """
        try:
            hello = channel.receive(Deadline(limits.LAST_WORD), "a greeting", largest=_LARGEST_HELLO)
        except (LinkError, DeadlineError):
            channel.close()
            return None
        except BaseException:
            channel.close()
            raise
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            channel.close()
            return None
        if hello.protocol == PROTOCOL:
            return hello
        channel.close()
        raise LinkRefusedError(
            f"the engine worker on {hello.device} speaks link protocol {hello.protocol} (checkpoint-engine-core "
            f"{hello.library}), this side {PROTOCOL}; install matching versions in both environments"
        )

    def close(self) -> None:
        """Stops listening and removes the socket."""
        self._socket.close()
        self._directory.close()


def connect(handle: str, deadline: Deadline, cancel: Cancel | None = None) -> tuple[ReceiverChannel, str]:
    """Connects to the listener that made `handle`; returns the channel and the token to show.

    Raises:
        LinkError: the handle is malformed, or nobody listens there.
        LinkRefusedError: the listener belongs to another user.
    """
    parts = urlsplit(handle)
    if parts.scheme != _SCHEME or not parts.path or not parts.fragment:
        raise LinkError(
            f"{handle.split('#', maxsplit=1)[0]!r} is not a handle of this checkpoint-engine; do both sides run the "
            "same version?"
        )
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(deadline.remaining, 0.001))
        connection.connect(parts.path)
        return ReceiverChannel(connection, FromSender, cancel), parts.fragment
    except LinkRefusedError:
        connection.close()
        raise
    except OSError as error:
        connection.close()
        raise LinkError(
            f"cannot reach the parameter server at {parts.path}: {error}; sender and engine must share a host and a "
            "file system"
        ) from error


def _check_peer(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.geteuid():
        raise LinkRefusedError(f"the other side of the link runs as user {user}, this one as {os.geteuid()}")
    return process


def _poll(connection: socket.socket, event: int, milliseconds: int) -> bool:
    poller = select.poll()
    poller.register(connection, event)
    return bool(poller.poll(milliseconds))
