"""How far a rank has filled its segments, as the others see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.errors import CheckpointEngineError, RankError
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.source import copying, refill
from checkpoint_engine.source.filling import FillPiece
from checkpoint_engine.source.refill import NewTensors, Refill
from checkpoint_engine.source.refill_plan import RefillPlan
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer.exports import export_segments
from checkpoint_engine.transfer.fill_marks import FillMarks

pytestmark = pytest.mark.pure

SECONDS = 5.0
SEGMENTS, PIECES, PIECE = 2, 3, 4096


class Filling:
    """A rank's segments, which are filled piece by piece as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.segments = [Segment.create(PIECES * PIECE + 256) for _ in range(SEGMENTS)]
        self.may_come = [threading.Event() for _ in range(SEGMENTS * PIECES)]
        self.error: CheckpointEngineError | None = None
        entries = [
            SegmentEntry(
                segment.nbytes,
                tuple(TensorEntry(f"{number}.{i}", "uint8", (PIECE,), i * PIECE) for i in range(PIECES)),
                segment.address,
            )
            for number, segment in enumerate(self.segments)
        ]
        gates = iter(self.may_come)

        def pieces(*arguments: Any) -> list[FillPiece]:
            return [self._held(piece, next(gates)) for piece in copying.pieces_into(*arguments)]

        monkeypatch.setattr(copying, "_CHUNK", PIECE)
        monkeypatch.setattr(refill, "pieces_into", pieces)
        values = [torch.ones(PIECE, dtype=torch.uint8) for _ in self.may_come]
        self.refill = Refill(NewTensors(RefillPlan(entries), values), self.segments)

    def _held(self, piece: FillPiece, gate: threading.Event) -> FillPiece:
        def run() -> None:
            gate.wait(SECONDS)
            if self.error is not None:
                raise self.error
            piece.run()

        return FillPiece(piece.start, piece.end, run, piece.from_device)

    def close(self) -> None:
        for gate in self.may_come:
            gate.set()
        self.refill.give_up()
        for segment in self.segments:
            segment.close()


@pytest.fixture
def fillings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Filling]]:
    made = [Filling(monkeypatch) for _ in range(2)]
    yield made
    for each in made:
        each.close()


@pytest.fixture
def marks(fillings: Sequence[Filling]) -> Iterator[list[FillMarks]]:
    made = [FillMarks(rank, filling.refill) for rank, filling in enumerate(fillings)]
    yield made
    for each in made:
        each.close()


def meet(marks: Sequence[FillMarks], fillings: Sequence[Filling]) -> None:
    for rank, each in enumerate(marks):
        other = 1 - rank
        exported = marks[other].exported
        assert exported is not None
        each.meet({other: (export_segments(fillings[other].segments), exported)})


def bucket(owner: int, number: int) -> Bucket:
    segment, piece = divmod(number, PIECES)
    return Bucket(owner, segment, piece * PIECE, PIECE, ())


def is_there(marks: FillMarks, wanted: Bucket, seconds: float = 0.05) -> bool:
    """Within so many seconds."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    try:
        marks.wait(wanted, check)
    except TimeoutError:
        return False
    return True


def test_others_see_what_has_come_and_no_more(fillings: list[Filling], marks: list[FillMarks]) -> None:
    meet(marks, fillings)
    for number, gate in enumerate(fillings[1].may_come):
        for rank in range(2):
            assert not is_there(marks[rank], bucket(1, number))
        gate.set()
        for rank in range(2):
            assert is_there(marks[rank], bucket(1, number), SECONDS)
        filled = fillings[1].segments[number // PIECES].tensor
        assert filled.sum() == (number % PIECES + 1) * PIECE
    assert not is_there(marks[0], bucket(0, 0))


def test_what_comes_out_of_turn_waits_for_what_lies_before_it(fillings: list[Filling], marks: list[FillMarks]) -> None:
    meet(marks, fillings)
    first, second, *_ = fillings[1].may_come
    second.set()
    assert not is_there(marks[0], bucket(1, 1))
    first.set()
    assert is_there(marks[0], bucket(1, 1), SECONDS)


def test_a_bucket_may_end_behind_its_last_tensor(fillings: list[Filling], marks: list[FillMarks]) -> None:
    meet(marks, fillings)
    for gate in fillings[1].may_come:
        gate.set()
    for segment in range(SEGMENTS):
        assert is_there(marks[0], Bucket(1, segment, 0, PIECES * PIECE + 256, ()), SECONDS)


def test_who_came_late_sees_what_there_is(fillings: list[Filling]) -> None:
    for gate in fillings[1].may_come:
        gate.set()
    fillings[1].refill.wait_for_all(lambda: None)
    marks = [FillMarks(rank, filling.refill) for rank, filling in enumerate(fillings)]
    meet(marks, fillings)
    assert is_there(marks[0], bucket(1, SEGMENTS * PIECES - 1))
    for each in marks:
        each.close()


def test_who_waits_for_another_notices_that_his_own_bytes_do_not_come(
    fillings: list[Filling], marks: list[FillMarks]
) -> None:
    meet(marks, fillings)
    fillings[0].error = CheckpointEngineError("the driver refuses")
    for gate in fillings[0].may_come:
        gate.set()
    with pytest.raises(CheckpointEngineError, match="the driver refuses"):
        is_there(marks[0], bucket(1, 0), SECONDS)


def test_whoever_is_not_needed_any_more_waits_no_longer(fillings: list[Filling], marks: list[FillMarks]) -> None:
    meet(marks, fillings)
    cancel = Cancel()
    cancel.set(RankError("rank 1 is gone"))
    for owner in range(2):
        with pytest.raises(RankError, match="rank 1 is gone"):
            marks[0].wait(bucket(owner, 0), cancel.check)


def test_a_mark_that_is_gone_is_refused(fillings: list[Filling], marks: list[FillMarks]) -> None:
    marks[1].close()
    with pytest.raises(RankError, match="rank 1"):
        meet(marks, fillings)


def test_a_rank_that_has_everything_is_not_waited_for() -> None:
    marks = FillMarks(0, None)
    assert marks.exported is None
    for owner in range(2):
        assert is_there(marks, bucket(owner, 0))
    marks.close()
