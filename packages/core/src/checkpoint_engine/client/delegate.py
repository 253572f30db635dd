"""A client that finds out, when it is first asked, which other one speaks to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.client.engine_client import EngineClient, PauseMode
from checkpoint_engine.client.plugins import adapter_client, settling_client, telling_client, verifying_client
from checkpoint_engine.contract.reports import WorkerStatus
from checkpoint_engine.deadline import Deadline

__all__ = ["ClientDelegate"]


class ClientDelegate(ABC):
    """See `checkpoint_engine.client.engine_client.EngineClient`; finding out counts against the time of each call."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None:
        """Remembers whom to ask."""
        self.endpoint = Endpoint(endpoint)
        self.timeout = timeout

    @abstractmethod
    def chosen(self, deadline: Deadline) -> EngineClient:
        """The client that speaks to the engine.

        Raises:
            EngineRequestError: what answers there is no engine that can be spoken to.
            DeadlineError: nothing answers in time.
            MissingDependencyError: its plugin is not installed here.
        """

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until an engine answers, and then until it serves; raises as `chosen` and `EngineClient`."""
        self.chosen(deadline).wait_ready(deadline)

    def world_size(self) -> int | None:
        """Number of the engine's workers; None if it cannot tell."""
        return self.chosen(Deadline(self.timeout)).world_size()

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """See `EngineClient.update_weights`."""
        deadline = Deadline(timeout)
        client = self.chosen(deadline)
        client.update_weights(
            handles, version=version, pause=pause, reset_caches=reset_caches, timeout=deadline.remaining
        )

    def load_adapter(
        self, name: str, directory: Path, *, version: str, pause: PauseMode, reset_caches: bool, timeout: float
    ) -> None:
        """See `AdapterClient.load_adapter`.

        Raises:
            MissingDependencyError: the engine that answers takes none.
        """
        deadline = Deadline(timeout)
        taking = adapter_client(self.chosen(deadline))
        left = deadline.remaining
        taking.load_adapter(name, directory, version=version, pause=pause, reset_caches=reset_caches, timeout=left)

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """See `WorkersClient.verify_weights`.

        Raises:
            MissingDependencyError: the plugin of the engine that answers cannot do this.
        """
        deadline = Deadline(timeout)
        verifying_client(self.chosen(deadline)).verify_weights(handles, version=version, timeout=deadline.remaining)

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """See `WorkersClient.status`.

        Raises:
            MissingDependencyError: the plugin of the engine that answers cannot do this.
        """
        return telling_client(self.chosen(deadline)).status(deadline)

    def is_paused(self, deadline: Deadline) -> bool:
        """See `WorkersClient.is_paused`.

        Raises:
            MissingDependencyError: the plugin of the engine that answers cannot do this.
        """
        return telling_client(self.chosen(deadline)).is_paused(deadline)

    def settle_orphan(self, deadline: Deadline) -> str:
        """See `WorkersClient.settle_orphan`.

        Raises:
            MissingDependencyError: the plugin of the engine that answers cannot do this.
        """
        return settling_client(self.chosen(deadline)).settle_orphan(deadline)
