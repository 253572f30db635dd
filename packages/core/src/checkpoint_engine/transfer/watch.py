"""Watches over an update: another rank's failure, a rank that is lost, the engine's answer, the deadline.

Whatever happens first throws the cancel switch, so that no wait of this rank outlives the update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import msgspec
from typing_extensions import Self

from checkpoint_engine import limits
from checkpoint_engine.collective import Board, failure_key
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.pause import PauseClock, timing_pauses
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, EngineRequestError, RankError

__all__ = ["EngineRequest", "Watch"]

_TICK_SECONDS = 0.1


class Watch:
    """Runs in the background from `__enter__` to `__exit__`."""

    def __init__(
        self,
        board: Board,
        key: str,
        cancel: Cancel,
        deadline: Deadline,
        trouble: Callable[[], CheckpointEngineError | None] = lambda: None,
    ) -> None:
        """Makes one; `trouble` says what else is wrong, and does not wait."""
        self._trouble = trouble
        self._board = board
        self._key = failure_key(key)
        self._cancel = cancel
        self._deadline = deadline
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine-watch", daemon=True)

    def report(self, failure: Failure) -> Failure:
        """Tells all other ranks; returns the first failure, which is the one that counts."""
        return msgspec.json.decode(self._board.post(self._key, msgspec.json.encode(failure)), type=Failure)

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
        self._thread.join(limits.EXPLANATION)

    def _run(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Nothing here waits for another rank: what is known is known already."""
        failure, lost = self.first_failure(), self._board.lost()
        if failure is not None:
            self._cancel.set(RankError(f"rank {failure.rank} failed in {failure.phase}: {failure.message}"))
        elif lost is not None:
            self._cancel.set(RankError(f"rank {lost[0]} {lost[1]}", rank=lost[0]))
        elif (trouble := self._trouble()) is not None:
            self._cancel.set(trouble)
        elif self._deadline.expired:
            self._cancel.set(DeadlineError(f"the update did not complete within {self._deadline.said}"))


class EngineRequest:
    """Asks the engine to update, in a thread of its own: the engine answers only when the update is over."""

    def __init__(self, ask: Callable[[], None], cancel: Cancel) -> None:
        self._ask = ask
        self._cancel = cancel
        self._error: CheckpointEngineError | None = None
        self.pause = PauseClock()
        """For how long the engine was paused, once it has answered."""
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

    def ends(self, seconds: float) -> bool:
        """Whether the engine answers, whatever it says, in that time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def settled(self) -> CheckpointEngineError | None:
        """What the engine's client says of a failure, if it knows what the engine holds since; waits a moment."""
        if not self.ends(limits.LAST_WORD) or self._error is None or self._error.held == CheckpointEngineError.held:
            return None
        return self._error

    def _run(self) -> None:
        try:
            with timing_pauses(self.pause):
                self._ask()
        except Exception as error:  # noqa: BLE001 - a caller's function may raise anything; it is carried to the update
            self._error = error if isinstance(error, CheckpointEngineError) else _as_request_error(error)
            self._cancel.set(self._error)


def _as_request_error(error: Exception) -> EngineRequestError:
    converted = EngineRequestError(f"asking the engine to update failed: {type(error).__name__}: {error}")
    converted.__cause__ = error
    return converted
