"""Why an update failed: the same from an engine's worker to the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import msgspec

from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.errors import CheckpointEngineError, RankError, UpdateError

__all__ = ["Failure", "Held", "describe_failures"]


class Held(str, Enum):
    """Which weights an engine, or one of its workers, holds after a failure."""

    OLD = "old"
    NEW = "new"
    MIXTURE = "mixture"
    UNKNOWN = "unknown"


class Failure(msgspec.Struct, frozen=True):
    """What failed first, where and why. `error` is the class of the error; empty if nobody said."""

    rank: int | None
    """Of the parameter server; None where only an engine's worker is known."""
    phase: Phase
    error: str
    message: str
    worker: int | None = None
    """Of the engine."""
    held: Held = Held.UNKNOWN
    rolled_back: str = ""
    """See `UpdateError`."""

    @classmethod
    def of(cls, error: Exception, phase: Phase, rank: int) -> Failure:
        """That of a rank, by its error; an update's own error knows better where it was."""
        held = Held(error.held) if isinstance(error, CheckpointEngineError) else Held.UNKNOWN
        said = str(error).encode(errors="backslashreplace").decode()  # names of files need not be text
        if isinstance(error, UpdateError):
            return cls(
                error.rank,
                Phase(error.phase),
                error.kind or type(error).__name__,
                said,
                None,
                held,
                error.rolled_back,
            )
        lost = error.rank if isinstance(error, RankError) else None  # who is lost cannot say so itself
        return cls(rank if lost is None else lost, phase, type(error).__name__, said, held=held)

    @classmethod
    def of_worker(cls, worker: int, phase: str, text: str, held: Held = Held.UNKNOWN) -> Failure:
        """That of a worker, which puts class and message into one text."""
        error, colon, message = text.partition(": ")
        if colon and error.isidentifier():
            return cls(None, Phase(phase or Phase.UPDATE), error, message, worker, held)
        return cls(None, Phase(phase or Phase.UPDATE), "", text, worker, held)

    def as_error(self, message: str) -> UpdateError:
        """As it is raised on every rank, with a message of the one that raises it."""
        error = UpdateError(message, rank=self.rank or 0, phase=self.phase, kind=self.error)
        error.held, error.rolled_back = self.held.value, self.rolled_back
        return error

    @property
    def text(self) -> str:
        """Class and message."""
        return f"{self.error}: {self.message}" if self.error else self.message


def describe_failures(failures: Iterable[Failure]) -> str:
    """The failures of several workers in one sentence, equal ones together; empty if there is none."""
    workers: dict[str, list[str]] = {}
    for failure in failures:
        workers.setdefault(f"failed in {failure.phase}: {failure.text}", []).append(str(failure.worker))
    return "; ".join(f"worker {', '.join(numbers)} {text}" for text, numbers in workers.items())
