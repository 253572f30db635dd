"""What all backends share: the worker behind them, sessions that heal, and that all workers succeed or none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from checkpoint_engine.sdk import MissingDependencyError, WorkerError
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.extension import WorkerState, give_methods, state_of
from checkpoint_engine_vllm.protocols import Worker
from checkpoint_engine_vllm.transfer import sessions
from checkpoint_engine_vllm.transfer.agreement import all_or_none

__all__ = ["TransferEngine"]

_engine: Any = importlib.import_module("vllm.distributed.weight_transfer.base").WeightTransferEngine
_ARGUMENTS = 4
"""Of the constructor from 0.25 on: configuration of transfers, of vLLM, device, model."""

_Result = TypeVar("_Result")


class TransferEngine(_engine):
    """vLLM's interface to a backend; see `vllm.distributed.weight_transfer.base.WeightTransferEngine`."""

    def __init__(self, *arguments: object) -> None:
        """Called by a worker once it has its model.

        Raises:
            MissingDependencyError: this vLLM starts and finishes updates itself.
        """
        if len(arguments) != _ARGUMENTS:
            raise MissingDependencyError(
                f"vLLM {compat.version()} leaves weight-transfer backends no say in start and finish; use vLLM 0.25 or "
                "newer, or update through the worker methods, which need no --weight-transfer-config"
            )
        _engine.__init__(self, *arguments)
        found = sessions.worker_in_the_making(cast("Any", self).vllm_config)
        if found is None:
            raise WorkerError("a backend of checkpoint-engine can only be made by vLLM's worker")
        self.worker: Worker = found
        sessions.heal_starts(found, self.give_up)
        give_methods(found)

    @property
    def state(self) -> WorkerState:
        """What is kept beside the worker, whichever way updates come in."""
        return state_of(self.worker)

    def together(self, what: str, do: Callable[[], _Result]) -> _Result:
        """Does something on all workers, or fails on all of them; a failure ends the session.

        Raises:
            Exception: what `do` raised here, or a `WorkerError` that names the worker.
        """
        try:
            return all_or_none(what, do)
        except Exception as error:
            self.give_up(error)
            sessions.end(self.worker)
            raise

    def give_up(self, error: Exception | None = None) -> None:
        """Ends what was started and not finished; `error` is why."""

    def synchronize(self) -> None:
        """Waits until the device has done all that it was told."""
        device = compat.device_of(self.worker)
        if device.type != "cpu":
            importlib.import_module("torch").accelerator.synchronize(device)

    def shutdown(self) -> None:
        """See vLLM."""
        self.give_up()
