"""What becomes of updates is published: in order, once each, and again for whoever missed it."""

from __future__ import annotations

import contextlib
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import AddressInUseError, DeadlineError, SettingError
from checkpoint_engine.events import EventPublisher, EventSubscriber, UpdateBegan, UpdateEnded, UpdateFailed
from checkpoint_engine.events.messages import TOPIC, replay_address
from tests.core.cluster import Cluster, check

pytestmark = pytest.mark.pure

EXAMPLE = Path(__file__).parents[2] / "examples" / "watch_updates.py"


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/events"


@pytest.fixture
def publisher(address: str) -> Iterator[EventPublisher]:
    made = EventPublisher(address)
    yield made
    made.close()


def began(publisher: EventPublisher, version: int) -> UpdateBegan:
    return UpdateBegan(
        session=publisher.session,
        time=time.time(),
        checkpoint="a",
        version=f"step-{version}",
        method="broadcast",
        ranks=2,
    )


def versions(subscriber: EventSubscriber, count: int) -> list[str]:
    return [subscriber.receive(Deadline(10)).version for _ in range(count)]


def test_who_comes_late_gets_what_was_before_and_what_comes(publisher: EventPublisher, address: str) -> None:
    for step in range(3):
        publisher.publish(began(publisher, step))
    with EventSubscriber(address, history=True) as late, EventSubscriber(address) as new:
        assert versions(late, 3) == ["step-0", "step-1", "step-2"]
        time.sleep(0.3)  # a subscription takes effect a moment after it is made
        publisher.publish(began(publisher, 3))
        assert versions(late, 1) == versions(new, 1) == ["step-3"]
        assert (late.missed, new.missed) == (0, 0)
        with pytest.raises(DeadlineError):
            late.receive(Deadline(0.3))


def test_a_gap_is_filled_and_what_is_lost_is_counted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.events.publisher._REMEMBERED", 4)
    publisher = EventPublisher(address)
    with EventSubscriber(address) as subscriber:
        time.sleep(0.3)
        publisher.publish(began(publisher, 0))
        assert versions(subscriber, 1) == ["step-0"]
        subscriber._socket.unsubscribe(TOPIC)  # as if ZeroMQ had dropped them
        time.sleep(0.3)
        for step in range(1, 7):
            publisher.publish(began(publisher, step))
        time.sleep(0.3)
        subscriber._socket.subscribe(TOPIC)
        time.sleep(0.3)
        publisher.publish(began(publisher, 7))
        assert versions(subscriber, 4) == ["step-4", "step-5", "step-6", "step-7"]
        assert subscriber.missed == 3
        publisher.close()

        again = EventPublisher(address)  # another session, which counts anew
        again.publish(began(again, 8))
        assert first_of(again, subscriber) == "step-8"
        assert subscriber.missed == 3
        again.close()


def first_of(publisher: EventPublisher, subscriber: EventSubscriber) -> str:
    """What a subscriber hears first once it has found a publisher that was started again."""
    patience = Deadline(30)
    while True:
        patience.check("the first event of another session")
        with contextlib.suppress(DeadlineError):
            return subscriber.receive(Deadline(0.3)).version
        publisher.publish(began(publisher, 9))


def test_nobody_can_stop_it(publisher: EventPublisher, address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(replay_address(address))
        for frames in ([b""], [b"x" * 8, b"y"], [b"\xff" * 8], [b"garbage"]):
            stranger.send_multipart(frames)
        with EventSubscriber(address) as subscriber:
            time.sleep(0.3)
            start = time.monotonic()
            for step in range(5000):  # more than ZeroMQ keeps for whoever does not read
                publisher.publish(began(publisher, step))
            assert time.monotonic() - start < 5
            assert versions(subscriber, 1) == ["step-0"]


def test_it_is_private_and_says_what_is_wrong_with_an_address(publisher: EventPublisher, address: str) -> None:
    path = Path(address.removeprefix("ipc://"))
    assert [file.stat().st_mode & 0o777 for file in (path, path.with_name("events.replay"))] == [0o600, 0o600]
    with pytest.raises(AddressInUseError, match="choose another address"):
        EventPublisher("tcp://192.0.2.1:5557")
    for wrong in ("5557", "tcp://localhost", "tcp://:5", "tcp://h:0", "tcp://h:65535", "udp://h:1", "ipc://"):
        with pytest.raises(SettingError, match="not to"):
            EventPublisher(wrong)


def test_its_sockets_go_with_it_and_not_those_of_the_next(address: str) -> None:
    directory = Path(address.removeprefix("ipc://")).parent
    first = EventPublisher(address)
    second = EventPublisher(address)
    first.close()
    assert {file.name for file in directory.iterdir()} == {"events", "events.replay"}
    second.close()
    assert not list(directory.iterdir())


@pytest.mark.thorough
def test_updates_are_told_of(
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    clusters: Callable[[int], Cluster],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_EVENTS", address)
    cluster = clusters(2)
    cluster.register("a", {f"w{number}": torch.arange(64) + number for number in range(4)})
    check(cluster.update("a"))
    cluster.recorders[1].fail_in = "load"
    assert all(cluster.update("a"))
    with EventSubscriber(address, history=True) as subscriber:
        one, two, three, four = (subscriber.receive(Deadline(10)) for _ in range(4))
    assert isinstance(one, UpdateBegan)
    assert (one.checkpoint, one.version, one.method, one.ranks) == ("a", "a", "broadcast", 2)
    assert isinstance(two, UpdateEnded)
    assert (two.nbytes, two.tensors) == (4 * 64 * 8, 4)
    assert two.seconds["total"] > 0
    assert isinstance(three, UpdateBegan)
    assert isinstance(four, UpdateFailed)
    assert (four.rank, four.phase) == (1, "load")
    assert "told to fail in load" in four.message
    monkeypatch.setattr(sys, "argv", ["watch_updates.py", address, "--history", "--count", "4"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert [line.split("'a' ")[1].split()[0] for line in said] == ["is", "is", "is", "failed"]
