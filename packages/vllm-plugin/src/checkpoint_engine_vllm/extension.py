"""The methods that vLLM's workers get: `--worker-extension-cls checkpoint_engine_vllm.WorkerExtension`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, cast

from checkpoint_engine.sdk import (
    CheckpointEngineError,
    CheckpointStateError,
    Figures,
    Received,
    limits,
    open_device,
    pick_handle,
    receive_update,
    refuse_update,
)
from checkpoint_engine_vllm import compat, patched
from checkpoint_engine_vllm.adapters import take_adapter
from checkpoint_engine_vllm.beside import BESIDE
from checkpoint_engine_vllm.place import WorkerPlace
from checkpoint_engine_vllm.protocols import Worker
from checkpoint_engine_vllm.sink import VllmSink

__all__ = ["WorkerExtension", "WorkerState", "give_methods", "state_of"]

logger = logging.getLogger(__name__)

_STATE = "_checkpoint_engine_state"
_METHODS = "worker methods"
"""The way in that these are, in a worker's status."""


class WorkerExtension:
    """Mixed into vLLM's worker class, whose attributes it must not share; it has no constructor of its own."""

    def checkpoint_engine_update(
        self, handles: Mapping[str, str], version: str = "", timeout: float = limits.UPDATE
    ) -> dict[str, Any]:
        """Takes the update that one of `handles` (device identity -> handle) offers to this worker.

        Returns a report: `ok`, `dirty` (the weights may be a mixture), `version` held now, `error`, `phase`, `seconds`.
        """
        del version  # the sender says it as well
        return state_of(cast("Worker", self)).update(handles, float(timeout))

    def checkpoint_engine_status(self) -> dict[str, Any]:
        """What this worker holds: `version`, `dirty`, `state` (see `WeightsState`), `updating`, and library versions.

        `error` is that of the last update; `last_update` has the figures of the last one that succeeded; `beside` is
        the extension of somebody else's that these methods stand beside.
        """
        return state_of(cast("Worker", self)).status()

    def checkpoint_engine_abort(self) -> dict[str, Any]:
        """Gives up an update that was started over vLLM's weight transfer and never finished; returns the status."""
        return state_of(cast("Worker", self)).abort()

    def checkpoint_engine_adapter(self, name: str, number: int, directory: str) -> str:
        """Loads a LoRA adapter of this number anew, or forgets it if there is no directory; returns what went wrong."""
        return take_adapter(self, name, number, directory)

    def update_weights_from_ipc(self, zmq_handles: Mapping[str, str]) -> None:
        """Takes the update that one of the handles (device identity -> handle) offers to this worker.

        Raises:
            CheckpointEngineError: it did not succeed.
        """
        state_of(cast("Worker", self)).receive(zmq_handles, limits.UPDATE)


class WorkerState:
    """What is kept beside a worker from one update to the next."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.sink = patched.PatchedSink(worker) if patched.is_needed() else VllmSink(worker)
        """Puts tensors into this worker."""
        self._busy = threading.Lock()
        self._claimed_by = ""
        """The way in of an update that comes in several calls, and is under way."""
        self._give_up: Callable[[], None] | None = None
        self._door = ""
        self._error = ""
        self._details: Mapping[str, str | int | float] = {}

    def status(self) -> dict[str, Any]:
        """See `WorkerExtension.checkpoint_engine_status`."""
        place = WorkerPlace.of(self._worker)
        return {
            "version": self.sink.version,
            "dirty": self.sink.dirty,
            "state": self.sink.state.value,
            "update": self.sink.life.brought_by,
            **self.sink.life.parts(),
            "updating": self._busy.locked(),
            "door": self._door,
            "error": self._error,
            "rank": int(self._worker.rank),
            "replica": place.replica,
            "replicas": place.replicas,
            "in_step": place.in_step,
            "vllm": compat.version(),
            "last_update": dict(self._details),
            "beside": str(getattr(self._worker, BESIDE, "")),
        }

    def update(self, handles: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """See `WorkerExtension.checkpoint_engine_update`."""
        start = time.perf_counter()
        try:
            received = self.receive(handles, timeout)
        except Exception as error:  # noqa: BLE001 - the report carries it to whoever asked
            failed = {"ok": False, "phase": "update", "error": f"{type(error).__name__}: {error}"}
            return {**self.status(), **failed, "seconds": time.perf_counter() - start}
        done = {"ok": True, "phase": "", "seconds": received.seconds, "verified": received.verified}
        return {**received.details, **self.status(), **done}

    def receive(self, handles: Mapping[str, str], timeout: float, door: str = _METHODS) -> Received:
        """Takes an update, which came in through this door.

        Raises:
            CheckpointEngineError: it did not succeed.
        """
        place, device = WorkerPlace.of(self._worker), compat.device_of(self._worker)
        opened = open_device(device.type, index=device.index or 0, rank=place.rank)
        try:
            handle = pick_handle(handles, opened, place.rank, place.world_size)
            self._take_turn()
        except CheckpointEngineError as error:
            logger.warning("this worker takes no part in an update: %s", error)
            refuse_update(handles, opened, error)
            raise
        try:
            received = receive_update(handle, self.sink, opened, timeout=timeout)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"
            logger.exception("update of the weights failed; the worker %s", self.sink.life.describe())
            raise
        finally:
            self._busy.release()
        if not received.verified:
            self._note_success(door, received.details)
        return received

    # -- updates that come in several calls of vLLM's

    def claim(self, door: str, give_up: Callable[[], None]) -> None:
        """Keeps other updates out until `succeeded` or `release`; `give_up` ends the update before its time.

        Raises:
            CheckpointStateError: another one is under way.
        """
        self._take_turn()
        self._claimed_by, self._give_up = door, give_up

    def abort(self) -> dict[str, Any]:
        """Gives up an update that was begun and is waiting for its next call; returns the status."""
        if self._give_up is not None:
            self._give_up()
        return self.status()

    def release(self, error: Exception | None = None) -> None:
        """Lets others in again, after an update that failed or was given up."""
        if error is not None:
            self._error = f"{type(error).__name__}: {error}"
            logger.error("update of the weights failed (%s); the worker %s", self._error, self.sink.life.describe())
        if self._claimed_by:
            self._claimed_by, self._give_up = "", None
            self._busy.release()

    def succeeded(self, figures: Figures) -> None:
        """Lets others in again, after an update that is complete."""
        self._note_success(self._claimed_by, figures.details())
        self.release()

    def _note_success(self, door: str, details: Mapping[str, str | int | float]) -> None:
        self._door, self._error, self._details = door, "", details

    def _take_turn(self) -> None:
        if not self._busy.acquire(blocking=False):
            by = f" ({self._claimed_by}: start it anew, or finish it)" if self._claimed_by else ""
            raise CheckpointStateError(f"this worker is taking another update{by}; wait for it to end")


def give_methods(worker: Any) -> None:  # noqa: ANN401 - vLLM's own class
    """Gives a worker our methods, as far as its class lacks them: one that is not vLLM's gets no extension."""
    for name, method in vars(WorkerExtension).items():
        if not name.startswith("_") and not hasattr(worker, name):
            setattr(worker, name, MethodType(method, worker))


def state_of(worker: Worker) -> WorkerState:
    """What is kept beside a worker; made when it is first asked for."""
    state = cast("WorkerState | None", getattr(worker, _STATE, None))
    if state is None:
        state = WorkerState(worker)
        setattr(worker, _STATE, state)
    return state
