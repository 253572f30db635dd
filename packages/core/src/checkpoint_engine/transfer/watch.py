"""Watches over an update: another rank's failure, a rank that died, the engine's answer, the deadline.

Whatever happens first throws the cancel switch, so that no wait of this rank outlives the update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import msgspec
import torch.distributed as dist
from typing_extensions import Self

from checkpoint_engine.collective import Board, Failure, failure_key
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, EngineRequestError, RankError

_TICK_SECONDS = 0.1
_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 15.0
"""A rank that gives no sign of life for so long counts as dead."""


class Watch:
    """Runs in the background from `__enter__` to `__exit__`."""

    def __init__(self, board: Board, key: str, cancel: Cancel, deadline: Deadline) -> None:
        self._board = board
        self._key = failure_key(key)
        self._cancel = cancel
        self._deadline = deadline
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine-watch", daemon=True)

    def report(self, failure: Failure) -> None:
        """Tells all other ranks; the first failure is the one that counts."""
        self._board.post(self._key, msgspec.json.encode(failure))

    def first_failure(self) -> Failure | None:
        """What was reported first, by any rank."""
        text = self._board.read(self._key)
        return None if text is None else msgspec.json.decode(text, type=Failure)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(_SILENCE_SECONDS)

    def _run(self) -> None:
        try:
            board = self._board.for_other_thread()
            neighbour = _Neighbour(board)
            while not self._over.wait(_TICK_SECONDS):
                self._look(board, neighbour)
        except (dist.DistError, RuntimeError) as error:  # torch raises both for a store that is gone
            self._cancel.set(RankError(f"rank 0, which holds the store, is gone: {str(error).splitlines()[0]}"))

    def _look(self, board: Board, neighbour: _Neighbour) -> None:
        text = board.read(self._key)
        if text is not None:
            failure = msgspec.json.decode(text, type=Failure)
            self._cancel.set(RankError(f"rank {failure.rank} failed in {failure.phase}: {failure.message}"))
        elif self._deadline.expired:
            self._cancel.set(DeadlineError(f"the update did not complete within {self._deadline.seconds:g} s"))
        elif neighbour.is_silent():
            self._cancel.set(RankError(f"rank {neighbour.rank} gave no sign of life for {_SILENCE_SECONDS:g} s"))


class _Neighbour:
    """Each rank shows that it is alive and listens to the next one, so a thousand ranks cost no more than two."""

    def __init__(self, board: Board) -> None:
        self.rank = (board.rank + 1) % board.world_size
        self._board = board
        self._beats = 0
        self._last: bytes | None = None
        self._until_beat = Deadline(0.0)
        self._patience = Deadline(_SILENCE_SECONDS)

    def is_silent(self) -> bool:
        if not self._until_beat.expired:
            return False
        self._until_beat = Deadline(_BEAT_SECONDS)
        self._beats += 1
        self._board.beat(self._beats)
        latest = self._board.beat_of(self.rank)
        if latest != self._last:
            self._last = latest
            self._patience = Deadline(_SILENCE_SECONDS)
        return self._patience.expired


class EngineRequest:
    """Asks the engine to update, in a thread of its own: the engine answers only when the update is over."""

    def __init__(self, ask: Callable[[], None], cancel: Cancel) -> None:
        self._ask = ask
        self._cancel = cancel
        self._error: CheckpointEngineError | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine-request", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Waits for the engine's answer.

        Raises:
            EngineRequestError: the engine answered with an error, or could not be asked.
            DeadlineError: it did not answer.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise DeadlineError(f"the engine did not answer the update request within {seconds:g} s after the update")
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._ask()
        except Exception as error:  # noqa: BLE001 - a caller's function may raise anything; it is carried to the update
            self._error = error if isinstance(error, CheckpointEngineError) else _as_request_error(error)
            self._cancel.set(self._error)


def _as_request_error(error: Exception) -> EngineRequestError:
    converted = EngineRequestError(f"asking the engine to update failed: {type(error).__name__}: {error}")
    converted.__cause__ = error
    return converted
