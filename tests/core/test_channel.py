from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device.memory import CudaMemory, HostMemory
from checkpoint_engine.errors import (
    DeadlineError,
    LinkClosedError,
    LinkError,
    LinkRefusedError,
    RankError,
    SettingError,
)
from checkpoint_engine.link.channel import Listener, ReceiverChannel, SenderChannel, connect
from checkpoint_engine.link.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Accepted,
    Begin,
    Failed,
    Finish,
    Finished,
    FromReceiver,
    FromSender,
    Hello,
    Load,
    Loaded,
    Released,
    TensorSlice,
    encode_buckets,
)

SLICE = TensorSlice("läyer.0", "bfloat16", (2, 3), 256)
NOBODY = 65534


def begin(tensors: int = 1, staging: HostMemory | CudaMemory | None = None) -> Begin:
    bucket = tuple(TensorSlice(f"model.layers.{i}.weight", "bfloat16", (i, 4), 0) for i in range(tensors))
    buckets = encode_buckets((bucket, (), (SLICE,)))
    return Begin(PROTOCOL, "0.1", "2.11", "id", "weights", "v7", staging or HostMemory(4096), buckets)


def hello(token: str, protocol: int = PROTOCOL) -> Hello:
    return Hello(protocol, token, "cpu:0", "9.9", "2.11", os.getpid())


def framed(body: bytes) -> bytes:
    return struct.pack("!Q", len(body)) + body


@pytest.fixture
def pair() -> Iterator[tuple[SenderChannel, ReceiverChannel]]:
    ours, theirs = socket.socketpair()
    with SenderChannel(ours, FromReceiver) as sender, ReceiverChannel(theirs, FromSender) as receiver:
        yield sender, receiver


@pytest.fixture
def raw() -> Iterator[tuple[SenderChannel, socket.socket]]:
    """A channel, and a bare socket in the place of the other one."""
    ours, theirs = socket.socketpair()
    with SenderChannel(ours, FromReceiver) as sender, theirs:
        yield sender, theirs


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    # pytest's own directories can be too long for the path of a socket.
    directory = Path(tempfile.mkdtemp())
    listener = Listener(directory)
    yield listener
    listener.close()
    assert list(directory.iterdir()) == []
    directory.rmdir()


class Background(threading.Thread):
    """Runs a call in a thread and hands out its result or error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised again in `result`
            self._error = error

    def result(self) -> Any:
        self.join(20)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


def accepting(listener: Listener, seconds: float = 20.0, cancel: Cancel | None = None) -> Background:
    return Background(lambda: listener.accept(Deadline(seconds), cancel or Cancel(), "the worker connecting"))


def path_and_token(listener: Listener) -> tuple[str, str]:
    path, token = listener.handle.removeprefix("ce-link://").split("#")
    return path, token


def connected(path: str, seconds: float = 5) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


@pytest.mark.parametrize(
    "message",
    [
        begin(),
        begin(staging=CudaMemory(1 << 40, bytes(range(64)))),
        Load(3, 1 << 40),
        Finish(),
        Abort("ränk 3 died"),
    ],
)
def test_what_the_sender_says_arrives(pair: tuple[SenderChannel, ReceiverChannel], message: FromSender) -> None:
    sender, receiver = pair
    sender.send(message, Deadline(5))
    assert receiver.receive(Deadline(5), "a message") == message


@pytest.mark.parametrize(
    "message",
    [
        hello("token"),
        Accepted(),
        Loaded(3, 0.25),
        Released(),
        Finished("v7", 1.5, {"tensors": 3, "how": "fast", "share": 0.5}),
        Failed("load", "ValueError", "no such tensor", dirty=True),
        Aborted(dirty=False),
    ],
)
def test_what_the_receiver_says_arrives(pair: tuple[SenderChannel, ReceiverChannel], message: FromReceiver) -> None:
    sender, receiver = pair
    receiver.send(message, Deadline(5))
    assert sender.receive(Deadline(5), "a message") == message


def test_messages_keep_their_order_and_borders(pair: tuple[SenderChannel, ReceiverChannel]) -> None:
    sender, receiver = pair
    assert not receiver.ready()
    for bucket in range(20):
        sender.send(Load(bucket, 0), Deadline(5))
    assert receiver.ready()
    assert [receiver.receive(Deadline(5), "a bucket") for _ in range(20)] == [Load(i, 0) for i in range(20)]
    assert not receiver.ready()


def test_a_message_of_many_megabytes_arrives_in_pieces(pair: tuple[SenderChannel, ReceiverChannel]) -> None:
    sender, receiver = pair
    message = begin(tensors=100_000)
    assert len(msgspec.msgpack.encode(message)) > 4 << 20
    memory = os.memfd_create("test")
    sending = Background(lambda: sender.send(message, Deadline(20), (memory,)))
    assert receiver.receive(Deadline(20), "a message") == message
    sending.result()
    (descriptor,) = receiver.take_descriptors()
    assert os.path.sameopenfile(descriptor, memory)
    os.close(descriptor)
    os.close(memory)


def test_messages_arrive_that_come_byte_by_byte(raw: tuple[SenderChannel, socket.socket]) -> None:
    sender, other = raw
    receiving = Background(lambda: sender.receive(Deadline(20), "a message"))
    for byte in framed(msgspec.msgpack.encode(Loaded(5, 0.5))):
        other.send(bytes([byte]))
        time.sleep(0.001)
    assert receiving.result() == Loaded(5, 0.5)


def test_descriptors_travel_and_stay_open_here(pair: tuple[SenderChannel, ReceiverChannel]) -> None:
    sender, receiver = pair
    memory = os.memfd_create("test")
    os.write(memory, b"weights")
    sender.send(begin(), Deadline(5), (memory,))
    assert isinstance(receiver.receive(Deadline(5), "a message"), Begin)
    (descriptor,) = receiver.take_descriptors()
    assert receiver.take_descriptors() == ()
    assert os.pread(descriptor, 7, 0) == b"weights"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    os.fstat(memory)
    os.close(memory)


def test_descriptors_that_nobody_took_are_closed(pair: tuple[SenderChannel, ReceiverChannel]) -> None:
    sender, receiver = pair
    reading, writing = os.pipe()
    sender.send(begin(), Deadline(5), (writing,))
    receiver.receive(Deadline(5), "a message")
    os.close(writing)
    receiver.close()
    assert os.read(reading, 1) == b""  # at its end: no writer is left
    os.close(reading)


@pytest.mark.parametrize(("pieces", "at_once"), [(5, 60), (2, 200)])
def test_too_many_descriptors_are_refused_and_closed(
    raw: tuple[SenderChannel, socket.socket], pieces: int, at_once: int
) -> None:
    sender, other = raw
    reading, writing = os.pipe()
    for byte in framed(msgspec.msgpack.encode(Accepted()))[:pieces]:
        socket.send_fds(other, [bytes([byte])], [writing] * at_once)
    with pytest.raises(LinkError, match="more than 253 file descriptors"):
        sender.receive(Deadline(5), "a message")
    sender.close()
    other.close()
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)


def assert_takes(seconds: float, start: float) -> None:
    assert seconds - 0.05 <= time.monotonic() - start < seconds + 1.5


def test_silence_ends_with_the_deadline(pair: tuple[SenderChannel, ReceiverChannel]) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"the next bucket did not happen within 0\.3 s"):
        pair[1].receive(Deadline(0.3), "the next bucket")
    assert_takes(0.3, start)


def test_a_peer_that_drips_does_not_stretch_the_deadline(raw: tuple[SenderChannel, socket.socket]) -> None:
    sender, other = raw
    start = time.monotonic()

    def drip() -> None:
        while time.monotonic() < start + 3:
            other.send(b"\0")
            time.sleep(0.02)

    other.send(struct.pack("!Q", 1 << 20))
    dripping = Background(drip)
    with pytest.raises(DeadlineError):
        sender.receive(Deadline(0.5), "an answer")
    assert_takes(0.5, start)
    sender.close()
    with pytest.raises(BrokenPipeError):
        dripping.result()


def test_a_peer_that_does_not_read_ends_with_the_deadline(pair: tuple[SenderChannel, ReceiverChannel]) -> None:
    message = begin(tensors=100_000)
    start = time.monotonic()
    with pytest.raises(DeadlineError, match="sending"):
        pair[0].send(message, Deadline(0.3))
    assert_takes(0.3, start)


@pytest.mark.parametrize("what", ["receive", "send", "accept"])
def test_cancelling_ends_a_wait_with_its_cause(what: str) -> None:
    cancel = Cancel()
    directory = Path(tempfile.mkdtemp())
    listener = Listener(directory)
    ours, theirs = socket.socketpair()
    with theirs, SenderChannel(ours, FromReceiver, cancel) as sender:
        waits: dict[str, Callable[[], object]] = {
            "receive": lambda: sender.receive(Deadline(20), "a message"),
            "send": lambda: sender.send(begin(tensors=100_000), Deadline(20)),
            "accept": lambda: listener.accept(Deadline(20), cancel, "a worker"),
        }
        waiting = Background(waits[what])
        time.sleep(0.2)
        start = time.monotonic()
        cancel.set(RankError("rank 3 died"))
        cancel.set(RankError("a later cause"))
        with pytest.raises(RankError, match="rank 3 died"):
            waiting.result()
        assert_takes(0.05, start)
    listener.close()
    shutil.rmtree(directory)


@pytest.mark.parametrize("said", [b"", b"\0\0\0", framed(b"x" * 100)[:50]], ids=["nothing", "half-length", "half-body"])
def test_a_peer_that_closes_is_noticed(raw: tuple[SenderChannel, socket.socket], said: bytes) -> None:
    sender, other = raw
    other.sendall(said)
    other.close()
    with pytest.raises(LinkClosedError, match="waited for the greeting"):
        sender.receive(Deadline(20), "the greeting")
    with pytest.raises(LinkClosedError):
        sender.send(begin(tensors=100_000), Deadline(20))


def test_a_process_that_is_killed_is_noticed_at_once() -> None:
    ours, theirs = socket.socketpair()
    sleep = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]
    with subprocess.Popen(sleep, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE) as child:
        theirs.close()
        assert child.stdout is not None
        child.stdout.readline()
        with SenderChannel(ours, FromReceiver) as sender:
            waiting = Background(lambda: sender.receive(Deadline(30), "an answer"))
            time.sleep(0.2)
            assert waiting.is_alive()
            child.kill()
            start = time.monotonic()
            with pytest.raises(LinkClosedError):
                waiting.result()
            assert_takes(0.05, start)


HELLO_TAG = b"\xa4type\xa5Hello"

GARBAGE = {
    "nothing": b"",
    "random": b"\xc1\xff\x00garbage",
    "truncated": msgspec.msgpack.encode(hello("x"))[:-1],
    "list": msgspec.msgpack.encode([1, 2, 3]),
    "other-type": msgspec.msgpack.encode({"type": "Launch"}),
    "fields-missing": msgspec.msgpack.encode({"type": "Loaded"}),
    "wrong-field": msgspec.msgpack.encode({"type": "Loaded", "bucket": "three", "seconds": 1.0}),
    "sender's": msgspec.msgpack.encode(Finish()),
    "not-utf-8": b"\x82" + HELLO_TAG + b"\xa5token\xa2\xff\xfe",
    "huge-map": b"\xdf\xff\xff\xff\xff",
    "huge-list-inside": b"\x82" + HELLO_TAG + b"\xa1x\xdd\xff\xff\xff\xff",
    "deep": b"\x82" + HELLO_TAG + b"\xa1x" + b"\x91" * 200_000,
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_link_error(raw: tuple[SenderChannel, socket.socket], body: bytes) -> None:
    sender, other = raw
    other.setblocking(True)
    sending = Background(lambda: other.sendall(framed(body)))
    with pytest.raises(LinkError, match=f"not a message of protocol {PROTOCOL}"):
        sender.receive(Deadline(5), "a message")
    sending.result()


def test_a_huge_message_is_refused_when_it_is_announced(raw: tuple[SenderChannel, socket.socket]) -> None:
    sender, other = raw
    other.sendall(struct.pack("!Q", 1 << 62))
    with pytest.raises(LinkError, match=f"a message of {1 << 62} bytes was announced"):
        sender.receive(Deadline(5), "a message")


def test_a_worker_connects_and_both_talk(listener: Listener) -> None:
    waiting = accepting(listener)
    receiver, token = connect(listener.handle, Deadline(5))
    with receiver:
        receiver.send(hello(token), Deadline(5))
        sender, greeting = waiting.result()
        with sender:
            assert greeting == hello(token)
            sender.send(Finish(), Deadline(5))
            assert receiver.receive(Deadline(5), "the end") == Finish()


def test_only_this_user_can_reach_the_socket(listener: Listener) -> None:
    directory = Path(path_and_token(listener)[0]).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_each_listener_has_a_token_of_its_own() -> None:
    listeners = [Listener() for _ in range(2)]
    tokens = {path_and_token(listener)[1] for listener in listeners}
    assert len(tokens) == 2
    assert min(len(token) for token in tokens) >= 40
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    "said",
    [
        framed(msgspec.msgpack.encode(hello(""))),
        framed(msgspec.msgpack.encode(hello("wrong"))),
        framed(msgspec.msgpack.encode(hello("ünïcode"))),
        framed(msgspec.msgpack.encode(hello("wrong", protocol=99))),
        framed(msgspec.msgpack.encode(hello("x" * 5000))),
        framed(msgspec.msgpack.encode(Accepted())),
        framed(b"\x91" * 3000),
        struct.pack("!Q", 1 << 62),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
    ids=["no token", "wrong", "not ASCII", "protocol", "long", "accepted", "garbage", "exabytes", "HTTP", "nothing"],
)
def test_strangers_are_turned_away_and_the_worker_still_comes(listener: Listener, said: bytes) -> None:
    waiting = accepting(listener)
    path, token = path_and_token(listener)
    with connected(path) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""  # it learns nothing
    with connected(path) as worker:
        worker.sendall(framed(msgspec.msgpack.encode(hello(token))))
        sender, _ = waiting.result()
        sender.close()


def test_another_protocol_is_refused_with_both_versions(listener: Listener) -> None:
    waiting = accepting(listener)
    path, token = path_and_token(listener)
    with connected(path) as worker:
        worker.sendall(framed(msgspec.msgpack.encode(hello(token, protocol=PROTOCOL + 1))))
        with pytest.raises(
            LinkRefusedError, match=rf"cpu:0 speaks link protocol {PROTOCOL + 1} .*9\.9\), this side {PROTOCOL}"
        ):
            waiting.result()


def test_a_worker_that_never_comes_ends_with_the_deadline(listener: Listener) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"the worker connecting did not happen within 0\.3 s"):
        accepting(listener, 0.3).result()
    assert_takes(0.3, start)


def test_callers_that_say_nothing_do_not_keep_the_worker_waiting(listener: Listener) -> None:
    path, token = path_and_token(listener)
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connected(path))
        waiting = accepting(listener, 10.0)
        time.sleep(0.3)  # they are ahead of it
        start = time.monotonic()
        worker, _ = connect(listener.handle, Deadline(5))
        stack.enter_context(worker)
        worker.send(hello(token), Deadline(5))
        channel, greeting = waiting.result()
        stack.enter_context(channel)
        assert time.monotonic() - start < 1.0
        assert greeting.token == token
        assert channel.peer == os.getpid()


def test_strangers_without_end_do_not_stretch_the_deadline(listener: Listener) -> None:
    path, _ = path_and_token(listener)
    start = time.monotonic()
    waiting = accepting(listener, 0.5)

    def keep_knocking() -> None:
        while waiting.is_alive():
            with contextlib.suppress(OSError), connected(path, seconds=0.2) as stranger:
                stranger.sendall(framed(msgspec.msgpack.encode(hello("wrong"))))

    knocking = Background(keep_knocking)
    with pytest.raises(DeadlineError):
        waiting.result()
    assert_takes(0.5, start)
    knocking.result()


@pytest.mark.parametrize(
    "handle", ["", "ipc:///tmp/x#t", "ce-link://", "ce-link:///tmp/x", "ce-link://#t", "http://localhost/#token"]
)
def test_what_is_no_handle_is_refused(handle: str) -> None:
    with pytest.raises(LinkError, match="is not a handle"):
        connect(handle, Deadline(5))


def test_nobody_listening_is_an_error_that_keeps_the_token(tmp_path: Path) -> None:
    listener = Listener()
    path, token = path_and_token(listener)
    listener.close()
    for handle in (listener.handle, "ce-link:///proc/version#" + token, f"ce-link://{'/long' * 50}#{token}"):
        with pytest.raises(LinkError) as caught:
            connect(handle, Deadline(5))
        assert token not in str(caught.value)
    assert path in listener.handle


def test_a_path_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    with pytest.raises(SettingError, match="set TMPDIR to a short, writable path"):
        Listener(directory)
    assert list(directory.iterdir()) == []


AS_CLIENT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(20)
try:
    connection.connect(sys.argv[1])
    connection.sendall(bytes.fromhex(sys.argv[2]))
    print(repr(connection.recv(100)), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""

AS_SERVER = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listening", flush=True)
server.settimeout(20)
connection, _ = server.accept()
connection.settimeout(20)
print(repr(connection.recv(100)), flush=True)
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody can use."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def as_nobody(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable, "-c", program]
    try:
        return subprocess.Popen(
            [*command, *arguments],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            stdout=subprocess.PIPE,
            text=True,
        )
    except PermissionError:
        pytest.skip("another user cannot start Python here")


def output_of(child: subprocess.Popen[str]) -> str:
    output, _ = child.communicate(timeout=30)
    return output.strip()


def test_another_user_cannot_come_near(open_directory: Path) -> None:
    listener = Listener(open_directory)
    path, token = path_and_token(listener)
    greeting = framed(msgspec.msgpack.encode(hello(token))).hex()
    assert output_of(as_nobody(AS_CLIENT, path, greeting)) == "PermissionError"
    listener.close()


def test_another_user_is_turned_away_even_with_the_token(open_directory: Path) -> None:
    listener = Listener(open_directory)
    path, token = path_and_token(listener)
    Path(path).parent.chmod(0o777)
    Path(path).chmod(0o777)
    waiting = accepting(listener)
    greeting = framed(msgspec.msgpack.encode(hello(token))).hex()
    assert output_of(as_nobody(AS_CLIENT, path, greeting)) in {"b''", "ConnectionResetError", "BrokenPipeError"}
    assert waiting.is_alive()
    with connected(path) as worker:
        worker.sendall(bytes.fromhex(greeting))
        sender, _ = waiting.result()
        sender.close()
    listener.close()


def test_a_worker_does_not_show_its_token_to_another_user(open_directory: Path) -> None:
    path = open_directory / "link"
    with as_nobody(AS_SERVER, str(path)) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "listening\n"
        with pytest.raises(LinkRefusedError, match=f"runs as user {NOBODY}, this one as 0"):
            connect(f"ce-link://{path}#secret", Deadline(5))
        assert output_of(child) == "b''"
