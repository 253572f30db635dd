"""What ends an update from outside of its own thread."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from checkpoint_engine.collective import Board, ControlPlane, connect_ranks
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, EngineRequestError, RankError
from checkpoint_engine.transfer.watch import EngineRequest, Watch
from tests.ports import free_port


@pytest.fixture
def planes() -> Iterator[list[ControlPlane]]:
    port = free_port()
    made = [connect_ranks(rank, 2, "127.0.0.1", port) for rank in range(2)]
    for plane in made:
        plane.wait_until_connected(Deadline(10))
    yield made
    for plane in made:
        plane.close()


@pytest.fixture
def boards(planes: list[ControlPlane]) -> list[Board]:
    return [plane.board() for plane in planes]


def cause(cancel: Cancel, seconds: float = 5.0) -> CheckpointEngineError | None:
    cancel.wait(seconds)
    return cancel.cause


def test_the_failure_of_another_rank(boards: list[Board]) -> None:
    cancels = [Cancel(), Cancel()]
    with (
        Watch(boards[0], "u", cancels[0], Deadline(30)) as first,
        Watch(boards[1], "u", cancels[1], Deadline(30)) as second,
    ):
        second.report(Failure(1, Phase.LOAD, "ValueError", "it broke"))
        first.report(Failure(0, Phase.LOAD, "ValueError", "a consequence"))
        for cancel in cancels:
            error = cause(cancel)
            assert isinstance(error, RankError)
            assert "rank 1 failed in load: it broke" in str(error)
        assert first.first_failure() == Failure(1, Phase.LOAD, "ValueError", "it broke")


def test_a_rank_that_leaves_during_an_update(planes: list[ControlPlane], boards: list[Board]) -> None:
    cancels = [Cancel(), Cancel()]
    with Watch(boards[0], "u", cancels[0], Deadline(30)), Watch(boards[1], "u", cancels[1], Deadline(30)):
        assert not cancels[0].wait(0.5)
        planes[1].close()
        error = cause(cancels[0])
    assert isinstance(error, RankError)
    assert "rank 1" in str(error)
    assert "has left" in str(error)
    assert error.rank == 1


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


def test_rank_0_stays_until_the_others_have_read(planes: list[ControlPlane], boards: list[Board]) -> None:
    answers: list[list[bytes]] = []

    def gather(rank: int) -> None:
        answers.append(boards[rank].gather("k", bytes([rank]) * (8 << 20), Deadline(5), Cancel(), "both"))

    late = EngineRequest(lambda: (time.sleep(0.2), gather(1))[0], Cancel())
    gather(0)
    planes[0].close()
    late.join(5)
    assert [[part[:1] for part in parts] for parts in answers] == [[b"\0", b"\1"]] * 2
