"""The connection that outlives an update: each way in which it can end is noticed by the other side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.lease import MappingLease

Pair = tuple[MappingLease, MappingLease]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def pair(sockets: tuple[socket.socket, socket.socket]) -> Pair:
    return MappingLease(sockets[0]), MappingLease(sockets[1])


def waiting(lease: MappingLease) -> threading.Thread:
    thread = threading.Thread(target=lease.wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    return thread


def ends(thread: threading.Thread) -> bool:
    thread.join(5)
    return not thread.is_alive()


def test_an_end_is_asked_for_and_answered(pair: Pair) -> None:
    sender, receiver = pair
    unmapped: list[float] = []

    def watch() -> None:
        receiver.wait()
        time.sleep(0.1)
        unmapped.append(time.monotonic())
        receiver.close()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert sender.end(Deadline(5))
    assert unmapped  # not before the other side was done
    assert ends(thread)


def test_an_end_that_nobody_answers_is_not_waited_for_forever(pair: Pair) -> None:
    started = time.monotonic()
    assert not pair[0].end(Deadline(0.2))
    assert time.monotonic() - started < 2


def test_closing_wakes_the_other_side(pair: Pair) -> None:
    thread = waiting(pair[1])
    pair[0].close()
    assert ends(thread)


def test_cancelling_wakes_both_sides(pair: Pair) -> None:
    threads = [waiting(lease) for lease in pair]
    pair[1].cancel()
    assert all(ends(thread) for thread in threads)
    assert pair[0].end(Deadline(1))


def test_an_end_after_the_other_side_has_gone(pair: Pair) -> None:
    pair[1].close()
    assert pair[0].end(Deadline(1))
    pair[1].cancel()
    pair[1].close()


def test_a_process_that_dies_ends_it(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    os.set_inheritable(theirs.fileno(), True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    theirs.close()
    thread = waiting(MappingLease(ours))
    child.kill()
    child.communicate()
    assert ends(thread)


def test_a_child_that_inherited_the_connection_does_not_keep_it_open(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    os.set_inheritable(theirs.fileno(), True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        thread = waiting(MappingLease(ours))
        MappingLease(theirs).close()
        assert ends(thread)
    finally:
        child.kill()
        child.communicate()
