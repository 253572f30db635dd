"""What the parameter server asks of an engine's client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from checkpoint_engine.contract.reports import WorkerStatus
from checkpoint_engine.deadline import Deadline

__all__ = ["AdapterClient", "EngineClient", "PauseMode", "SettlingClient", "TellingClient", "VerifyingClient"]

PauseMode = Literal["keep", "abort", "wait", "none"]
"""What becomes of running requests: kept and continued, aborted, waited for; or the engine is not paused."""


class EngineClient(Protocol):
    """Speaks for one engine instance; made from its endpoint, `http://host:port` or `unix:/path/to.sock`."""

    def __init__(self, endpoint: str, *, timeout: float = 60.0) -> None: ...

    def wait_ready(self, deadline: Deadline) -> None:
        """Waits until the engine serves.

        Raises:
            DeadlineError: it does not come up in time; the message says what was seen last.
            EngineRequestError: something answers there, but it is not such an engine.
        """
        ...

    def world_size(self) -> int | None:
        """Number of the engine's workers, tensor- and pipeline-parallel; None if it cannot tell."""
        ...

    def update_weights(
        self,
        handles: Mapping[str, str],
        *,
        version: str,
        pause: PauseMode,
        reset_caches: bool,
        timeout: float,
    ) -> None:
        """Makes every worker of the engine take the update that `handles` (device identity -> handle) offers.

        Returns once all workers hold exactly `version` and the engine serves again. After a failure the
        engine serves again if its old weights are whole, and stays paused if they are not.

        Raises:
            EngineRequestError: the engine refuses, or a worker failed; the message names the worker.
            DeadlineError: it does not answer in time.
        """
        ...


@runtime_checkable
class AdapterClient(Protocol):
    """A client whose engine takes LoRA adapters while it serves."""

    def load_adapter(
        self, name: str, directory: Path, *, version: str, pause: PauseMode, reset_caches: bool, timeout: float
    ) -> None:
        """Has all workers take an adapter, in place of what they have under that name.

        Args:
            name: What requests call it.
            directory: Of this host: PEFT's `adapter_config.json` and `adapter_model.safetensors`; copied.
            version: For the engine's status.
            pause: What becomes of running requests.
            reset_caches: Whether the engine drops what it has cached.
            timeout: Seconds for all of it.

        Raises:
            EngineRequestError: the engine refuses; it serves what it had.
            DeadlineError: it does not answer in time.
        """
        ...


@runtime_checkable
class TellingClient(Protocol):
    """A client whose engine tells what its workers hold, and whether it runs requests."""

    def status(self, deadline: Deadline) -> list[WorkerStatus]:
        """See `WorkersClient.status`."""
        ...

    def is_paused(self, deadline: Deadline) -> bool:
        """See `WorkersClient.is_paused`."""
        ...


@runtime_checkable
class SettlingClient(Protocol):
    """A client that can tidy up after a sender that died."""

    def settle_orphan(self, deadline: Deadline) -> str:
        """See `WorkersClient.settle_orphan`."""
        ...


@runtime_checkable
class VerifyingClient(Protocol):
    """A client whose engine can be compared with a checkpoint."""

    def verify_weights(self, handles: Mapping[str, str], *, version: str, timeout: float) -> None:
        """See `WorkersClient.verify_weights`."""
        ...
