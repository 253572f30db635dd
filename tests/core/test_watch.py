"""What ends an update from outside of its own thread."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from cluster import free_port

from checkpoint_engine.collective import Board, Failure
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, EngineRequestError, RankError
from checkpoint_engine.transfer import watch
from checkpoint_engine.transfer.watch import EngineRequest, Watch


@pytest.fixture
def boards() -> list[Board]:
    port = free_port()
    stores = [
        dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=10), wait_for_workers=False)
        for rank in range(2)
    ]
    return [Board(store, rank, 2) for rank, store in enumerate(stores)]


def cause(cancel: Cancel, seconds: float = 5.0) -> CheckpointEngineError | None:
    cancel.wait(seconds)
    return cancel.cause


def test_the_failure_of_another_rank(boards: list[Board]) -> None:
    cancels = [Cancel(), Cancel()]
    with (
        Watch(boards[0], "u", cancels[0], Deadline(30)) as first,
        Watch(boards[1], "u", cancels[1], Deadline(30)) as second,
    ):
        second.report(Failure(1, "load", "ValueError", "it broke"))
        first.report(Failure(0, "load", "ValueError", "a consequence"))
        for cancel in cancels:
            error = cause(cancel)
            assert isinstance(error, RankError)
            assert "rank 1 failed in load: it broke" in str(error)
        assert first.first_failure() == Failure(1, "load", "ValueError", "it broke")


def test_a_rank_that_gives_no_sign_of_life(boards: list[Board], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(watch, "_BEAT_SECONDS", 0.2)
    cancels = [Cancel(), Cancel()]
    with Watch(boards[0], "u", cancels[0], Deadline(30)):
        with Watch(boards[1], "u", cancels[1], Deadline(30)):
            time.sleep(2.5)
            assert cancels[0].cause is None  # both are alive
        error = cause(cancels[0])
    assert isinstance(error, RankError)
    assert "rank 1 gave no sign of life" in str(error)


def test_the_deadline(boards: list[Board]) -> None:
    cancel = Cancel()
    with Watch(boards[0], "u", cancel, Deadline(0.3)):
        assert isinstance(cause(cancel), DeadlineError)


def test_an_engine_that_raises_and_one_that_does_not_answer() -> None:
    cancel = Cancel()

    def refuse() -> None:
        raise ConnectionError("nobody there")

    request = EngineRequest(refuse, cancel)
    assert isinstance(cause(cancel), EngineRequestError)
    with pytest.raises(EngineRequestError, match="nobody there"):
        request.join(5)
    slow = EngineRequest(lambda: time.sleep(0.5), Cancel())
    with pytest.raises(DeadlineError, match="did not answer"):
        slow.join(0.05)
    slow.join(5)


def test_rank_0_stays_until_the_others_have_read(boards: list[Board]) -> None:
    answers: list[list[bytes]] = []

    def gather(rank: int) -> list[bytes]:
        return boards[rank].gather("k", bytes([rank]), Deadline(5), Cancel(), "both")

    late = EngineRequest(lambda: (time.sleep(0.5), answers.append(gather(1)))[0], Cancel())
    answers.append(gather(0))
    late.join(5)
    assert answers == [[b"\0", b"\1"]] * 2
    boards[0]._last = "k/not-yet"
    reading = EngineRequest(lambda: (time.sleep(0.5), boards[1]._store.add("k/not-yet", 1))[0], Cancel())
    started = time.monotonic()
    boards[0].leave()
    assert 0.4 < time.monotonic() - started < 1.5
    reading.join(5)
