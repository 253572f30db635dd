"""Asks a `vllm serve` through vLLM's weight transfer, where its workers lack our methods and it runs our backend.

vLLM answers for all workers at once, and does not tell what they hold: after a failure the engine stays paused.
"""

from __future__ import annotations

from checkpoint_engine.sdk import CheckpointEngineError, EngineRequestError
from checkpoint_engine.sdk.client import Deadline, WorkerReport, WorkersOrder, WorkerStatus
from checkpoint_engine_vllm.development import DevelopmentClient

__all__ = ["TransferClient"]


class TransferClient(DevelopmentClient):
    """See `checkpoint_engine.client.engine_client.EngineClient`."""

    def wait_healthy(self, deadline: Deadline) -> None:
        """Waits until vLLM serves, whatever its workers can.

        Raises:
            DeadlineError: it does not come up in time.
            EngineRequestError: what answers is no engine.
        """
        super(DevelopmentClient, self).wait_ready(deadline)

    def is_open(self, deadline: Deadline) -> bool:
        """Whether this server was started with the backend `checkpoint_engine`."""
        try:
            self._post("/init_weight_transfer_engine", deadline, {"init_info": {}})
        except CheckpointEngineError:
            return False
        return True

    def ask_workers(self, order: WorkersOrder, deadline: Deadline) -> list[WorkerReport]:
        """Start, update and finish; see `WorkersClient`."""
        self._post("/start_weight_update", deadline, None)
        info = {"handles": dict(order.handles), "version": order.version, "timeout": deadline.remaining}
        self._post("/update_weights", deadline, {"update_info": info})
        self._post("/finish_weight_update", deadline, {"weight_version": order.version})
        return [WorkerReport(ok=True, version=order.version, verified=order.compare)]

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """Nobody says.

        Raises:
            EngineRequestError: always.
        """
        del deadline
        raise EngineRequestError(
            f"{self.endpoint.address}: vLLM's weight transfer does not tell what workers hold; its log does"
        )

    def _post(self, path: str, deadline: Deadline, body: object) -> None:
        self.endpoint.call("POST", path, deadline, body=body)
