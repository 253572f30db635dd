"""Every error that this project raises on purpose.

Each message names the thing that is wrong and the way out. All of them derive from `CheckpointEngineError`, so a
caller can catch one class; where a built-in class says the same (`ValueError`, `TimeoutError` …) the error derives
from that as well.
"""

from __future__ import annotations

__all__ = [
    "AccessRefusedError",
    "AddressInUseError",
    "CheckpointEngineError",
    "CheckpointFormatError",
    "CheckpointStateError",
    "DeadlineError",
    "DeviceMemoryError",
    "DuplicateTensorError",
    "EngineRequestError",
    "EngineSilentError",
    "HostMemoryError",
    "LinkClosedError",
    "LinkError",
    "LinkRefusedError",
    "MissingDependencyError",
    "MissingNameError",
    "PeerError",
    "PeerMovedError",
    "RankError",
    "SenderAbortedError",
    "SettingError",
    "TensorTooLargeError",
    "UnsupportedTensorError",
    "UpdateError",
    "WeightsRejectedError",
    "WorkerError",
    "WorkerSilentError",
    "WorkerTracebackError",
    "error_fields",
    "error_named",
]


class CheckpointEngineError(Exception):
    """Base of all errors raised here."""

    held: str = "unknown"
    """Which weights the engine holds that was to be updated, as far as known: `contract.failure.Held`."""


class WorkerTracebackError(CheckpointEngineError):
    """Where an engine's worker failed: the cause of the error that its parameter server raises."""


# -- what the user brings -------------------------------------------------------------------------------------------


class SettingError(CheckpointEngineError, ValueError):
    """An argument or environment variable has a value that cannot work."""


class CheckpointFormatError(CheckpointEngineError, ValueError):
    """A file is not what it claims to be: missing, truncated, or its header contradicts itself."""


class UnsupportedTensorError(CheckpointEngineError, ValueError):
    """A tensor has a dtype or layout that cannot be carried."""


class DuplicateTensorError(CheckpointEngineError, ValueError):
    """The same tensor name was registered twice: in two files, or on two ranks."""


class TensorTooLargeError(CheckpointEngineError, ValueError):
    """A single tensor does not fit into the largest bucket that is allowed."""


class AccessRefusedError(CheckpointEngineError, PermissionError):
    """A file or an address lies outside of what this server may touch; the message says who can allow it."""


# -- the state of the parameter server ------------------------------------------------------------------------------


class CheckpointStateError(CheckpointEngineError, RuntimeError):
    """The call does not fit the state of the checkpoint: unknown, registered twice, not gathered, or in use."""


class HostMemoryError(CheckpointEngineError, MemoryError):
    """The host cannot hold the checkpoint: memory, memlock limit or shared memory is too small."""


class DeviceMemoryError(CheckpointEngineError, MemoryError):
    """The device cannot hold even the smallest staging buffer."""


class AddressInUseError(CheckpointEngineError, OSError):
    """A port or socket path is taken by another process."""


class MissingDependencyError(CheckpointEngineError, ImportError):
    """An optional library is needed for what was asked; the message holds the install command."""


class MissingNameError(CheckpointEngineError, AttributeError):
    """A name comes with a plugin that is not installed: `hasattr` is False; the message holds the install command."""


# -- an update ------------------------------------------------------------------------------------------------------


class LinkError(CheckpointEngineError, ConnectionError):
    """The channel between a parameter-server rank and an engine worker failed."""


class LinkClosedError(LinkError):
    """The other side is gone: its process ended or closed the channel."""


class LinkRefusedError(LinkError):
    """The two sides may not or cannot talk: wrong token, other user, or another protocol version."""


class DeadlineError(CheckpointEngineError, TimeoutError):
    """Something did not happen within its deadline; the message says what, and how long was waited."""


class EngineSilentError(DeadlineError):
    """The engine takes connections and does not answer: its front, or one of its workers, is stopped or hung."""


class EngineRequestError(CheckpointEngineError, RuntimeError):
    """The engine could not be asked to update: unreachable, refused, or it answered with an error."""


class WeightsRejectedError(CheckpointEngineError, ValueError):
    """The engine was offered weights that are not its own: an unknown, missing or misshapen tensor."""


class WorkerError(CheckpointEngineError, RuntimeError):
    """An engine worker failed while it took the update; the message names worker, phase and cause."""


class WorkerSilentError(WorkerError):
    """An engine worker's process is stopped: it neither takes an update nor says anything."""


class SenderAbortedError(WorkerError):
    """The parameter server told a worker to give the update up: somebody else failed before it, or wanted it so."""


class RankError(CheckpointEngineError, RuntimeError):
    """Another rank of the parameter server failed or died; the message names it and its cause.

    `rank` is that rank, where it cannot say so itself.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class PeerError(CheckpointEngineError, ConnectionError):
    """The host memory of another parameter server could not be read; the message names it, the range and the cause."""


class PeerMovedError(PeerError):
    """It holds other bytes by now, or is another process: what is known of it is stale. Nothing of it was used."""


def error_named(name: str) -> type[CheckpointEngineError] | None:
    """The class of that name, if it is one of these and takes a message alone."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, CheckpointEngineError) and kind is not UpdateError:
        return kind
    return None


class UpdateError(CheckpointEngineError, RuntimeError):
    """An update did not complete. `rank` and `phase` say where; no engine worker serves half of it silently.

    `phase` is one of `checkpoint_engine.contract.phase.Phase`, `kind` the name of the class of the error that came
    first.
    """

    def __init__(self, message: str, *, rank: int, phase: str, kind: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.kind = kind
        self.rolled_back = ""
        """The version that all engines hold and serve again since, if they were given it back."""

    def add(self, note: str) -> None:
        """Says more, after what was said."""
        self.args = (f"{self}\n{note}" if note else str(self), *self.args[1:])


def error_fields(error: BaseException) -> dict[str, str | int]:
    """An error as JSON has it, on the terminal and over HTTP."""
    fields: dict[str, str | int] = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, UpdateError):
        fields |= {"rank": error.rank, "phase": str(error.phase), "kind": error.kind}
        if error.rolled_back:
            fields["rolled_back"] = error.rolled_back
    if isinstance(error, CheckpointEngineError) and error.held != CheckpointEngineError.held:
        fields["held"] = error.held
    return fields
