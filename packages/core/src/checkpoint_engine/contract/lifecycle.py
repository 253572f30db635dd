"""What one worker's weights are at any moment, and which moves lead from there to where.

Everything that is said of a worker's weights, on the link, in its status or in a log, is read from here, so that it is
one truth whatever has failed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from checkpoint_engine.contract.findings import listed
from checkpoint_engine.contract.sink import Update
from checkpoint_engine.errors import CheckpointStateError, WeightsRejectedError

__all__ = ["MOVES", "Lifecycle", "Move", "WeightsState"]


class WeightsState(enum.Enum):
    """Of one worker."""

    IDLE = "idle"
    """It holds exactly the weights of `version`, and takes no update."""
    BEGUN = "begun"
    """An update has begun; none of its tensors was taken over."""
    LOADING = "loading"
    """Some may have been: until the update ends, the weights count as a mixture."""
    FINISHED = "finished"
    """The last update is complete: it holds exactly the weights of that one's `version`."""
    DIRTY = "dirty"
    """Its weights may be a mixture of old and new; only a complete update heals that."""


class Move(enum.Enum):
    """What happens to a worker's weights."""

    BEGIN = "begin"
    REFUSE = "refuse"
    """The update begun was found not to fit; nothing was made ready for it."""
    LOAD = "load"
    FINISH = "finish"
    RESTORE = "restore"
    """The update was given up, and the old weights are back, or were never gone."""
    SPOIL = "spoil"
    """The update was given up, and they are not; or nobody knows what is held."""


MOVES: Mapping[WeightsState, Mapping[Move, WeightsState]] = {
    WeightsState.IDLE: {
        Move.BEGIN: WeightsState.BEGUN,
        Move.SPOIL: WeightsState.DIRTY,
    },
    WeightsState.BEGUN: {
        Move.REFUSE: WeightsState.IDLE,
        Move.LOAD: WeightsState.LOADING,
        Move.FINISH: WeightsState.FINISHED,
        Move.RESTORE: WeightsState.IDLE,
        Move.SPOIL: WeightsState.DIRTY,
    },
    WeightsState.LOADING: {
        Move.LOAD: WeightsState.LOADING,
        Move.FINISH: WeightsState.FINISHED,
        Move.RESTORE: WeightsState.IDLE,
        Move.SPOIL: WeightsState.DIRTY,
    },
    WeightsState.FINISHED: {
        Move.BEGIN: WeightsState.BEGUN,
        Move.SPOIL: WeightsState.DIRTY,
    },
    WeightsState.DIRTY: {
        Move.BEGIN: WeightsState.BEGUN,
        Move.SPOIL: WeightsState.DIRTY,
    },
}
"""The moves that are allowed. Where one leads to `IDLE` and the weights were a mixture before, they are one again."""


class Lifecycle:
    """The books of one worker: which weights it holds, and how far the update under way has come."""

    def __init__(self, version: str = "") -> None:
        """Begins with whole weights; their version is empty as long as nobody has said it."""
        self._state = WeightsState.IDLE
        self.version = version
        """Of the weights that were last whole."""
        self.brought_by = ""
        """The id of the update that brought those; a version may be brought twice, with other weights."""
        self.partial = False
        """Whether `version` brought a part of them: the rest is of `whole_version`, or of parts that came since."""
        self.whole_version = version
        """Of the last update that brought all."""
        self.update: Update | None = None
        """The one under way."""
        self.delivered: set[str] = set()
        """Names of its tensors that have come."""
        self._was_dirty = False

    @property
    def state(self) -> WeightsState:
        """How far it is; only moves change it."""
        return self._state

    @property
    def dirty(self) -> bool:
        """Whether the weights may be a mixture now."""
        if self._state is WeightsState.BEGUN:
            return self._was_dirty
        return self._state in (WeightsState.LOADING, WeightsState.DIRTY)

    @property
    def under_way(self) -> bool:
        """Whether an update has begun and not ended."""
        return self.update is not None

    def begin(self, update: Update) -> None:
        """An update begins.

        Raises:
            CheckpointStateError: another one is under way.
        """
        was_dirty = self.dirty
        self._move(Move.BEGIN)
        self._was_dirty = was_dirty
        self.update, self.delivered = update, set()

    def refuse(self) -> None:
        """It does not fit; nothing has changed."""
        self._end(Move.REFUSE)

    def load(self) -> None:
        """Tensors are about to be taken over.

        Raises:
            CheckpointStateError: no update is under way.
        """
        self._move(Move.LOAD)

    def deliver(self, names: Iterable[str]) -> None:
        """These tensors were taken over."""
        self.delivered.update(names)

    def undelivered(self) -> list[str]:
        """Tensors that were announced and have not come."""
        announced = () if self.update is None else self.update.tensors
        if len(self.delivered) >= len(announced):
            return []
        return [name for name in announced if name not in self.delivered]

    def check_complete(self) -> Update:
        """The update under way, of which everything has come.

        Raises:
            CheckpointStateError: none is under way.
            WeightsRejectedError: tensors are missing.
        """
        self._next(Move.FINISH)
        missing = self.undelivered()
        if missing or self.update is None:
            raise WeightsRejectedError(f"announced but not delivered: {listed(missing)}, which did not come")
        return self.update

    def finish(self) -> None:
        """The engine holds the update's weights, and nothing else."""
        update = self.check_complete()
        self._note(update.version, update.id, partial=update.partial)
        self._end(Move.FINISH)

    def restore(self) -> None:
        """The update was given up, and the weights are those from before."""
        self._end(Move.RESTORE)

    def spoil(self) -> None:
        """What is held is a mixture, or unknown."""
        self._end(Move.SPOIL)

    def others_brought(self, version: str) -> None:
        """Weights came, wholly or in part, that did not come through here; their version is empty if nobody said it."""
        self._note(version, "", partial=False)

    def _note(self, version: str, update: str, *, partial: bool) -> None:
        self.version, self.brought_by, self.partial = version, update, partial
        if not partial:
            self.whole_version = version

    def status(self) -> dict[str, str | bool]:
        """What a worker's status says of its weights, see `checkpoint_engine.contract.reports.WorkerStatus`."""
        return {
            "state": self._state.value,
            "dirty": self.dirty,
            "version": self.version,
            "update": self.brought_by,
            "updating": self.under_way,
            **self.parts(),
        }

    def parts(self) -> dict[str, str | bool]:
        """Whether what it holds came in parts, and over what."""
        return {"partial": self.partial, "whole_version": self.whole_version}

    def describe(self) -> str:
        """What a worker holds, for people; goes on from "the worker"."""
        if self.dirty:
            return "may hold a mixture of old and new weights until a complete update succeeds"
        held = f"version {self.version!r}" + (f" (a part, over {self.whole_version!r})" if self.partial else "")
        return f"holds {held}" if self._state is WeightsState.FINISHED else f"still holds {held}"

    def _end(self, move: Move) -> None:
        self._move(move)
        self.update, self.delivered = None, set()
        if self._state is WeightsState.IDLE and self._was_dirty:
            self._state = WeightsState.DIRTY

    def _move(self, move: Move) -> None:
        self._state = self._next(move)

    def _next(self, move: Move) -> WeightsState:
        found = MOVES[self._state].get(move)
        if found is None:
            under_way = f"an update to version {self.update.version!r}" if self.update else "no update"
            raise CheckpointStateError(
                f"{move.value} was called while {under_way} is under way ({self._state.value}); an update is begin, "
                "load, finish, and abort wherever it fails"
            )
        return found
