"""What an engine's workers say of themselves, as their engine's front passes it on: in JSON, across versions."""

from __future__ import annotations

import hashlib

import msgspec

from checkpoint_engine.contract.failure import Failure, Held

__all__ = ["WorkerReport", "WorkerStatus", "name_of_update"]


class WorkerReport(msgspec.Struct, frozen=True):
    """What a worker's `checkpoint_engine_update` returns. `dirty`: its weights may be a mixture."""

    ok: bool
    dirty: bool = False
    version: str = ""
    error: str = ""
    """Class and message."""
    phase: str = ""
    seconds: float = 0.0
    verified: bool = False
    """Whether its weights were only compared with what came."""

    def failure(self, worker: int) -> Failure | None:
        """Why it failed, if it did."""
        if self.ok:
            return None
        return Failure.of_worker(worker, self.phase, self.error, Held.MIXTURE if self.dirty else Held.UNKNOWN)


class WorkerStatus(msgspec.Struct, frozen=True):
    """What a worker's `checkpoint_engine_status` returns: `dirty` says that its weights may be a mixture."""

    dirty: bool
    version: str | None = None
    updating: bool = False
    update: str | None = None
    """Names the update that brought the weights (`name_of_update`); empty for those of its start, None if it does not
    tell."""
    partial: bool = False
    """Whether `version` brought a part of the weights, over those of `whole_version`."""
    whole_version: str | None = None
    error: str = ""
    """Of the last update, if that failed."""
    replicas: int = 1
    """Data-parallel replicas that answer at the same endpoint."""
    in_step: int = 1
    """Replicas, of this endpoint and others, that take each step together: if one waits for weights within a step, the
    others cannot end theirs."""
    door: str = ""
    """By which way the last one came in, in the engine's own words."""
    last_update: dict[str, str | int | float] = {}
    """Figures of the last update that succeeded, as `UpdateFigures` has them."""

    @property
    def steps_elsewhere(self) -> bool:
        """Whether replicas behind other endpoints take each step with it."""
        return self.in_step > self.replicas


def name_of_update(handle: str) -> str:
    """Names the update that a parameter server offers a worker by this handle, and gives nothing of it away."""
    return hashlib.sha256(handle.encode()).hexdigest()[:16]
