"""One worker process of a reference engine; started by `reference_server`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from checkpoint_engine.contract.figures import Figures
from checkpoint_engine.contract.sink import Tensors, Update
from checkpoint_engine.device import open_device
from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine.processes import ParentPipe
from checkpoint_engine.receiver.reception import Received, pick_handle, receive_update
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.reference.workers import READY, WORKER_FAULTS, Answer, Request

__all__ = ["ReferenceWorker", "main", "serve"]

_STALL_SECONDS = 4.0

logger = logging.getLogger(__name__)


class _FaultySink(ReferenceSink):
    """Fails once, in the way that a test asks for; after that it works."""

    def __init__(self, engine: ReferenceEngine, fault: str) -> None:
        super().__init__(engine)
        self.fault = fault

    def begin(self, update: Update) -> None:
        """Refuses, if so asked."""
        super().begin(update)
        if self._strikes("refuse"):
            raise WeightsRejectedError("this engine was told to refuse")

    def load(self, tensors: Tensors) -> None:
        """Fails half-way through the first bucket, if so asked."""
        if not self.fault.endswith("-in-load"):
            super().load(tensors)
            return
        super().load(tensors[: len(tensors) // 2])
        if self._strikes("die-in-load"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._strikes("raise-in-load"):
            raise KeyError("this loader was told to fail")
        if self._strikes("stall-in-load"):
            time.sleep(_STALL_SECONDS)
            super().load(tensors)

    def finish(self) -> Figures:
        """Fails when all is loaded, if so asked."""
        if self._strikes("raise-in-finish"):
            raise RuntimeError("this engine was told to fail at the end")
        return super().finish()

    def _strikes(self, fault: str) -> bool:
        if self.fault != fault:
            return False
        self.fault = ""
        return True


class ReferenceWorker:
    """The methods that `/collective_rpc` can run."""

    def __init__(self, spec: ModelSpec, tp_rank: int, tp_size: int, device: str, fault: str = "") -> None:
        kind, _, first = device.partition(":")
        self._device = open_device(kind, index=int(first or 0) + tp_rank, rank=tp_rank)
        self._engine = ReferenceEngine(spec, tp_rank=tp_rank, tp_size=tp_size, device=self._device.torch_device)
        self._sink = _FaultySink(self._engine, fault)
        self._addresses = self._engine.addresses()
        self.methods: dict[str, Callable[..., object]] = {
            method.__name__: method
            for method in (
                self.checkpoint_engine_update,
                self.checkpoint_engine_status,
                self.update_weights_from_ipc,
                self.verify,
                self.checksum,
                self.set_fault,
            )
        }

    def checkpoint_engine_update(self, handles: dict[str, str], version: str, timeout: float) -> dict[str, Any]:
        """Takes an update; reports failure instead of raising it."""
        start = time.perf_counter()
        try:
            received = self._receive(handles, timeout)
        except Exception as error:
            # Whatever the loader raises goes to the client, in words, with the state it left behind.
            logger.info("the update failed", exc_info=True)
            return {
                "ok": False,
                "dirty": self._sink.dirty,
                "version": self._sink.version,
                "error": f"{type(error).__name__}: {error}",
                "phase": "update",
                "seconds": time.perf_counter() - start,
            }
        return {
            "ok": received.version == version,
            "dirty": self._sink.dirty,
            "version": received.version,
            "error": "" if received.version == version else f"version {received.version!r} came",
            "phase": "",
            "seconds": received.seconds,
            "load_seconds": received.load_seconds,
            "verified": received.verified,
        }

    def checkpoint_engine_status(self) -> dict[str, Any]:
        """What this worker holds."""
        return dict(self._sink.life.status())

    def update_weights_from_ipc(self, handles: dict[str, str]) -> None:
        """Takes an update; raises if that fails."""
        self._receive(handles, 600.0)

    def verify(self, directory: str) -> dict[str, Any]:
        """Compares every parameter, byte by byte, with a cold start from the files of a checkpoint."""
        engine = self._engine
        fresh = ReferenceEngine.cold_start(Path(directory), tp_rank=engine.tp_rank, tp_size=engine.tp_size)
        comparison = engine.compare(fresh)
        moved = [name for name, address in engine.addresses().items() if address != self._addresses[name]]
        return {
            "ok": comparison.equal and not moved,
            "parameters": comparison.parameters,
            "tensors": comparison.tensors,
            "nbytes": comparison.nbytes,
            "different": list(comparison.different),
            "moved": moved,
        }

    def checksum(self) -> str:
        """SHA-256 over all parameters."""
        return self._engine.checksum()

    def set_fault(self, fault: str) -> None:
        """Makes the next update go wrong on the last worker, for tests."""
        if self._engine.tp_rank == self._engine.tp_size - 1:
            self._sink.fault = fault

    def _receive(self, handles: dict[str, str], timeout: float) -> Received:
        handle = pick_handle(handles, self._device, self._engine.tp_rank, self._engine.tp_size)
        return receive_update(handle, self._sink, self._device, timeout=timeout)


def serve(pipe: ParentPipe, worker: ReferenceWorker) -> None:
    """Answers requests until the front closes the pipe."""
    pipe.send(msgspec.json.encode(Answer(READY)))
    for line in pipe.lines():
        request = msgspec.json.decode(line, type=Request)
        pipe.send(msgspec.json.encode(_answer(worker, request)))


def _answer(worker: ReferenceWorker, request: Request) -> Answer:
    method = worker.methods.get(request.method)
    if method is None:
        known = ", ".join(worker.methods)
        return Answer(request.id, error=f"workers have no method {request.method!r}; they have {known}")
    try:
        return Answer(request.id, result=method(*request.args, **request.kwargs))
    except Exception as error:  # noqa: BLE001 - the caller gets it, in words
        return Answer(request.id, error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=ModelSpec.parse, required=True)
    parser.add_argument("--tp-rank", type=int, required=True)
    parser.add_argument("--tp-size", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fault", choices=WORKER_FAULTS, default="")
    options = parser.parse_args()
    pipe = ParentPipe()
    serve(pipe, ReferenceWorker(options.spec, options.tp_rank, options.tp_size, options.device, options.fault))
    os._exit(0)  # nothing here outlives the process, and torch takes a second to say goodbye


if __name__ == "__main__":
    main()
