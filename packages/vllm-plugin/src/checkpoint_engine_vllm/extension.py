"""The methods that vLLM's workers get: `--worker-extension-cls checkpoint_engine_vllm.WorkerExtension`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

from checkpoint_engine.device import Device, open_device
from checkpoint_engine.engine.receiver import Received, pick_handle, receive_update
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine_vllm import compat, patched
from checkpoint_engine_vllm.adapter import VllmAdapter
from checkpoint_engine_vllm.protocols import Worker

logger = logging.getLogger(__name__)

_DEFAULT_TIMEOUT = 600.0
_STATE = "_checkpoint_engine_state"


class WorkerExtension:
    """Mixed into vLLM's worker class, whose attributes it must not share; it has no constructor of its own."""

    def checkpoint_engine_update(
        self, handles: Mapping[str, str], version: str = "", timeout: float = _DEFAULT_TIMEOUT
    ) -> dict[str, Any]:
        """Takes the update that one of `handles` (device identity -> handle) offers to this worker.

        Returns a report: `ok`, `dirty` (the weights may be a mixture), `version` held now, `error`, `phase`, `seconds`.
        """
        del version  # the sender says it as well
        return state_of(cast("Worker", self)).update(handles, float(timeout))

    def checkpoint_engine_status(self) -> dict[str, Any]:
        """What this worker holds: `version`, `dirty`, `updating`, and library versions.

        `error` is that of the last update; `last_update` has the figures of the last one that succeeded.
        """
        return state_of(cast("Worker", self)).status()

    def update_weights_from_ipc(self, handles: Mapping[str, str]) -> None:
        """Takes the update that one of `handles` (device identity -> handle) offers to this worker.

        Raises:
            CheckpointEngineError: it did not succeed.
        """
        state_of(cast("Worker", self)).receive(handles, _DEFAULT_TIMEOUT)


class WorkerState:
    """What is kept beside a worker from one update to the next."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.adapter = patched.PatchedAdapter(worker) if patched.is_needed() else VllmAdapter(worker)
        """Puts tensors into this worker."""
        self._busy = threading.Lock()
        self._error = ""
        self._details: Mapping[str, str | int | float] = {}

    def status(self) -> dict[str, Any]:
        """See `WorkerExtension.checkpoint_engine_status`."""
        return {
            "version": self.adapter.version,
            "dirty": self.adapter.dirty,
            "updating": self._busy.locked(),
            "error": self._error,
            "rank": int(self._worker.rank),
            "vllm": compat.version(),
            "last_update": dict(self._details),
        }

    def update(self, handles: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """See `WorkerExtension.checkpoint_engine_update`."""
        start = time.perf_counter()
        try:
            received = self.receive(handles, timeout)
        except Exception:  # noqa: BLE001 - the status has it; the report carries it to whoever asked
            return {**self.status(), "ok": False, "phase": "update", "seconds": time.perf_counter() - start}
        done = {"ok": True, "phase": "", "seconds": received.seconds, "verified": received.verified}
        return {**received.details, **self.status(), **done}

    def receive(self, handles: Mapping[str, str], timeout: float) -> Received:
        """Takes an update.

        Raises:
            CheckpointEngineError: it did not succeed.
        """
        if not self._busy.acquire(blocking=False):
            raise CheckpointStateError("this worker is taking another update; wait for it to end")
        try:
            device, rank, world_size = _place_of(self._worker, len(handles))
            handle = pick_handle(handles, device, rank, world_size)
            received = receive_update(handle, self.adapter, device, timeout=timeout)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"
            logger.exception("update of the weights failed; the worker %s", self._describe())
            raise
        finally:
            self._busy.release()
        if not received.verified:
            self._error, self._details = "", received.details
        return received

    def _describe(self) -> str:
        if self.adapter.dirty:
            return "may hold a mixture of old and new weights until a complete update succeeds"
        return f"still holds version {self.adapter.version!r}"


def state_of(worker: Worker) -> WorkerState:
    """What is kept beside a worker; made when it is first asked for."""
    state = cast("WorkerState | None", getattr(worker, _STATE, None))
    if state is None:
        state = WorkerState(worker)
        setattr(worker, _STATE, state)
    return state


def _place_of(worker: Worker, handles: int) -> tuple[Device, int, int]:
    """The worker's device, its rank among all workers that one call reaches, and how many those are."""
    parallel = worker.vllm_config.parallel_config
    rank, world_size = int(worker.rank), int(parallel.world_size)
    replica = int(getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0)))
    if replica and not getattr(parallel, "data_parallel_external_lb", False):
        # One call reaches all replicas behind one server. A dense model's configuration does not say how many.
        replicas = max(int(parallel.data_parallel_size), handles // world_size)
        rank, world_size = replica * world_size + rank, replicas * world_size
    elif not getattr(parallel, "data_parallel_external_lb", False):
        world_size *= max(int(parallel.data_parallel_size), 1)
    device = compat.device_of(worker)
    return open_device(device.type, index=device.index or 0, rank=rank), rank, world_size
