"""What an engine holds after an update failed, by what its workers state; it serves again where that is whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from checkpoint_engine import limits
from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.client.engine_turn import EngineTurn
from checkpoint_engine.contract.failure import Held
from checkpoint_engine.contract.reports import WorkerStatus
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, EngineRequestError

__all__ = ["Settlement", "held_by"]

_POLL_SECONDS = 0.25
_HEAL = "a complete update heals it"

logger = logging.getLogger(__name__)


class _Engine(Protocol):
    """What is asked of an engine's client here; see `WorkersClient`."""

    endpoint: Endpoint

    def status(self, deadline: Deadline) -> list[WorkerStatus]: ...
    def world_size(self) -> int | None: ...
    def is_paused(self, deadline: Deadline) -> bool: ...
    def resume(self, deadline: Deadline) -> None: ...
    def reset_caches_late(self, deadline: Deadline) -> None: ...
    def publish_version(self, version: str, deadline: Deadline) -> None: ...


class Settlement:
    """Made by the sender whose turn it is; everything it says ends with whether the engine serves, or what heals it."""

    def __init__(self, engine: _Engine, turn: EngineTurn) -> None:
        self._engine = engine
        self._turn = turn

    def unheard(self, why: str = "") -> tuple[Held, str]:
        """Of an engine that does not say what it holds."""
        said = f" ({why})" if why else ""
        found = f"what its workers hold now is unknown{said}; {self._stays()}"
        return Held.UNKNOWN, f"{found}: if `checkpoint-engine status` fails, too, restart it, and update again"

    def after(self, version: str, updates: Collection[str], *, reset_caches: bool) -> tuple[Held, str]:
        """After an update of this sender failed: which weights the engine holds now, and the same in words.

        Args:
            version: The one that the update should have brought.
            updates: As in `held_by`.
            reset_caches: Whether what was computed with other weights is to be dropped.
        """
        try:
            workers = self._all_workers(Deadline(limits.SETTLE))
        except CheckpointEngineError as error:
            return self.unheard(str(error))
        held = held_by(workers, version, updates)
        if held is Held.OLD:
            return held, f"it still holds its old weights ({_versions(workers)}), {self._serve()}"
        if held is Held.NEW:
            return held, f"all its workers hold version {version!r} already, {self._serve_new(version, reset_caches)}"
        found = "its weights are a mixture now" if workers else "no worker says what it holds now"
        return held, f"{found}; {self._stays()}: update again"

    def after_death(self, deadline: Deadline) -> str:
        """After another sender died: what the engine holds now, in words; it serves again if that sender had paused it.

        Raises:
            CheckpointEngineError: the engine cannot be asked.
        """
        workers = self._at_rest(deadline)
        if held_by(workers, "", ()) is Held.OLD:  # one whole version, whichever
            return f"its weights are whole ({_versions(workers)}), {self._serve()}"
        return f"its weights may be a mixture; {self._stays()}: {_HEAL}"

    def resume(self, deadline: Deadline) -> None:
        """Has the engine serve, if an update has paused it."""
        if self._turn.paused:
            self._engine.resume(deadline)
            self._turn.note_resume()

    def resume_quietly(self) -> bool:
        """The same after a failure; returns whether that could be done."""
        if self._turn.paused and self._turn.steps_elsewhere:
            logger.warning(
                "%s stays paused: replicas behind other endpoints step with it", self._engine.endpoint.address
            )
            return False
        try:
            self.resume(Deadline(limits.SETTLE))
        except CheckpointEngineError as error:
            logger.warning("cannot resume %s: %s", self._engine.endpoint.address, error)
            return False
        return True

    def _at_rest(self, deadline: Deadline) -> list[WorkerStatus]:
        """What the workers say once they have noticed that their sender is gone."""
        workers = self._all_workers(deadline)
        while any(worker.updating for worker in workers) and not deadline.expired:
            time.sleep(min(_POLL_SECONDS, deadline.remaining))
            workers = self._all_workers(deadline)
        return workers

    def _all_workers(self, deadline: Deadline) -> list[WorkerStatus]:
        """What every worker holds.

        Raises:
            CheckpointEngineError: the engine does not tell that of all of them; vLLM's development routes leave out
                other data-parallel replicas than the first.
        """
        workers, expected = self._engine.status(deadline), self._engine.world_size()
        self._turn.steps_elsewhere |= any(worker.steps_elsewhere for worker in workers)
        if expected is not None and 0 < len(workers) < expected:
            who = self._engine.endpoint.address
            raise EngineRequestError(f"{who} tells what {len(workers)} of its {expected} workers hold, not the others")
        return workers

    def _serve(self) -> str:
        if not self.resume_quietly():
            return "but could not be resumed: update again"
        try:
            paused = self._engine.is_paused(Deadline(limits.KNOCK))
        except CheckpointEngineError:
            paused = False
        return "and stays paused, as somebody else had it" if paused else "and it serves them"

    def _serve_new(self, version: str, reset_caches: bool) -> str:  # noqa: FBT001
        """Does what else belongs to an update: all workers have taken it, though somebody did not hear of that."""
        deadline = Deadline(limits.SETTLE)
        try:
            if reset_caches:
                self._engine.reset_caches_late(deadline)
            self._engine.publish_version(version, deadline)
            self.resume(deadline)
        except CheckpointEngineError as error:
            stays = "it may still be paused" if self._turn.paused else "its caches may be stale"
            return f"but {stays} ({error}): update again"
        return self._serve()

    def _stays(self) -> str:
        if self._turn.paused:
            return "it was left paused"
        if self._turn.paused_by_others:
            return "it stays paused, as somebody else had it"
        return "it was not paused, and may serve them"


def held_by(workers: Sequence[WorkerStatus], version: str, updates: Collection[str]) -> Held:
    """Which weights the workers of an engine hold together.

    Args:
        workers: What each of them states.
        version: The one that the update should have brought.
        updates: Names of the update, see `name_of_update`: a version may be brought twice, with other weights.
    """
    if not workers:
        return Held.UNKNOWN
    if any(worker.dirty or worker.updating for worker in workers):
        return Held.MIXTURE
    held = {Held.NEW if _is_new(worker, version, updates) else Held.OLD for worker in workers}
    if len(held) > 1 or len({worker.version for worker in workers}) > 1:
        return Held.MIXTURE
    return held.pop()


def _is_new(worker: WorkerStatus, version: str, updates: Collection[str]) -> bool:
    if worker.update is None:  # it has a plugin that does not tell
        return worker.version == version
    return worker.update in updates


def _versions(workers: Sequence[WorkerStatus]) -> str:
    named = workers[0].version  # the same for all
    return f"version {named!r}" if named else "those of its start"
