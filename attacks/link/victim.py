"""Exposes a parameter-server rank, or an engine worker, to a hostile other side, and judges the outcome."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from checkpoint_engine.contract.sink import Update
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import open_device
from checkpoint_engine.device.memory import HostMemory
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.link.channel import Listener, SenderChannel
from checkpoint_engine.link.messages import PROTOCOL, Accepted, Begin, Finish, Hello, Load, TensorSlice
from checkpoint_engine.receiver.reception import receive_update

MOST_SECONDS = 15.0


def framed(body: bytes, *, length: int | None = None) -> bytes:
    """A message as it travels; may announce any length."""
    return struct.pack("!Q", len(body) if length is None else length) + body


def greeting(token: str) -> bytes:
    """What a worker says first."""
    return framed(msgspec.msgpack.encode(Hello(PROTOCOL, token, "cpu:0", "0", "0", os.getpid())))


@contextlib.contextmanager
def knocking(path: str) -> Generator[socket.socket]:
    """A bare connection to a rank."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(MOST_SECONDS)
        connection.connect(path)
        yield connection


def wait_for_hang_up(connection: socket.socket) -> None:
    """Waits until the rank has turned us away."""
    with contextlib.suppress(ConnectionError):
        if connection.recv(1):
            sys.exit("NOT REFUSED: the rank answered a stranger")


def attack_before_token(attack: Callable[[str], None]) -> None:
    """Attacks a rank that waits for its worker, which comes afterwards and must be taken; exits if it is not."""
    start = time.monotonic()
    with listening() as (listener, path, token), ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, Deadline(MOST_SECONDS), Cancel(), "the worker connecting")
        attack(path)
        with knocking(path) as worker:
            worker.sendall(greeting(token))
            channel = _result(accepted)[0]
            channel.send(Finish(), Deadline(1.0))
            channel.close()
    print(f"turned away; the worker was taken within {time.monotonic() - start:.2f} s")


def attack_with_token(attack: Callable[[socket.socket], None], talk: Callable[[SenderChannel], object]) -> None:
    """Connects with the token, attacks, and lets the rank `talk`; exits unless it ends with a named error."""
    with listening() as (listener, path, token), ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, Deadline(MOST_SECONDS), Cancel(), "the worker connecting")
        with knocking(path) as worker:
            worker.sendall(greeting(token))
            channel = _result(accepted)[0]
            start = time.monotonic()
            with channel:
                talking = pool.submit(talk, channel)
                attack(worker)
                _report(talking, start)


def attack_worker(attack: Callable[[SenderChannel], None]) -> None:
    """Plays a hostile parameter server to a worker; exits unless the worker ends with a named error, weights whole."""
    engine = Engine()
    with listening() as (listener, _, _), ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receive_update, listener.handle, engine, open_device("cpu"), timeout=MOST_SECONDS)
        channel, _ = listener.accept(Deadline(MOST_SECONDS), Cancel(), "the worker connecting")
        start = time.monotonic()
        with channel:
            with contextlib.suppress(CheckpointEngineError):  # the worker may hang up on us at any time
                attack(channel)
            _report(receiving, start)
    if engine.finished:
        sys.exit("NOT REFUSED: the engine serves what was sent")


class Engine:
    """An engine that believes everything."""

    finished = False

    def begin(self, update: Update) -> None:
        pass

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in tensors:
            tensor.to(torch.float32).sum()

    def finish(self) -> Mapping[str, str | int | float]:
        self.finished = True
        return {}

    def abort(self) -> bool:
        return True


def begin(nbytes: int, *buckets: tuple[TensorSlice, ...]) -> Begin:
    """Announces an update through `nbytes` of host staging."""
    return Begin(PROTOCOL, "0", "0", "id", "hostile", "v1", HostMemory(nbytes), buckets)


def expect_accepted(channel: SenderChannel) -> None:
    """Waits until the worker is ready; it hangs up instead if it sees through us."""
    answer = channel.receive(Deadline(MOST_SECONDS), "the worker accepting")
    if not isinstance(answer, Accepted):
        raise CheckpointEngineError(str(answer))


def load_and_finish(channel: SenderChannel, *loads: Load) -> None:
    """Sends buckets, and tells the worker that this was all."""
    for load in loads:
        channel.send(load, Deadline(5.0))
    channel.send(Finish(), Deadline(5.0))
    while True:
        channel.receive(Deadline(5.0), "answers")


@contextlib.contextmanager
def listening() -> Generator[tuple[Listener, str, str]]:
    """A listener with its path and token."""
    with tempfile.TemporaryDirectory() as directory:
        listener = Listener(Path(directory))
        try:
            path, token = listener.handle.removeprefix("ce-link://").split("#")
            yield listener, path, token
        finally:
            listener.close()


def _result(future: Future[tuple[SenderChannel, Hello]]) -> tuple[SenderChannel, Hello]:
    try:
        return future.result(MOST_SECONDS)
    except CheckpointEngineError as error:
        sys.exit(f"THE RANK GAVE UP: {type(error).__name__}: {error}")


def _report(outcome: Future[object], start: float) -> None:
    error = outcome.exception(MOST_SECONDS)
    seconds = time.monotonic() - start
    if not isinstance(error, CheckpointEngineError):
        sys.exit(f"NOT REFUSED: it ended with {error!r}")
    print(f"refused within {seconds:.2f} s: {type(error).__name__}: {str(error)[:300]}")


def in_background(call: Callable[[], None]) -> None:
    """Runs a call that may fail once the victim has hung up."""

    def quietly() -> None:
        with contextlib.suppress(OSError):
            call()

    threading.Thread(target=quietly, daemon=True).start()
