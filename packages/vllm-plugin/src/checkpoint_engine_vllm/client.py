"""The client of `vllm serve`: finds out which way in is open, and goes by the best."""

from __future__ import annotations

from typing import TypeVar

from checkpoint_engine.sdk import EngineRequestError
from checkpoint_engine.sdk.client import ClientDelegate, Deadline, WorkersClient
from checkpoint_engine_vllm.development import NO_EXTENSION, DevelopmentClient
from checkpoint_engine_vllm.routes_client import RoutesClient
from checkpoint_engine_vllm.transfer_client import TransferClient

__all__ = ["VllmClient"]

_Client = TypeVar("_Client", bound=WorkersClient)


class VllmClient(ClientDelegate):
    """See `checkpoint_engine.client.engine_client.EngineClient`; docs/doors.md has the ways in."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None:
        super().__init__(endpoint, timeout=timeout)
        self._door: WorkersClient | None = None

    def chosen(self, deadline: Deadline) -> WorkersClient:
        """That of the way in: our own routes if this vLLM has them, else those of its development mode.

        Raises:
            EngineRequestError: nobody listens there, or our routes are there and refuse us.
            DeadlineError: it does not answer in time.
        """
        if self._door is None:
            own = self._client_of(RoutesClient)
            self._door = own if own.is_open(deadline) else self._client_of(DevelopmentClient)
        return self._door

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until vLLM serves, and checks that its workers can be updated.

        Where they lack our methods, vLLM's weight transfer is the way in, if it was started with our backend.

        Raises:
            DeadlineError: it does not come up in time.
            EngineRequestError: it cannot be updated; the message says how to start it.
        """
        transfer = self._client_of(TransferClient)
        transfer.wait_healthy(deadline)
        try:
            self.chosen(deadline).wait_ready(deadline)
        except EngineRequestError as error:
            if NO_EXTENSION not in str(error) or not transfer.is_open(deadline):
                raise
            self._door = transfer

    def _client_of(self, kind: type[_Client]) -> _Client:
        client = kind(self.endpoint.address, timeout=self.timeout)
        client.endpoint = self.endpoint
        return client
