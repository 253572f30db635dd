"""Every error that this project raises on purpose.

Each message names the thing that is wrong and the way out. All of them derive from `CheckpointEngineError`, so a
caller can catch one class; where a built-in class says the same (`ValueError`, `TimeoutError` …) the error derives
from that as well.
"""

from __future__ import annotations


class CheckpointEngineError(Exception):
    """Base of all errors raised here."""


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


# -- an update ------------------------------------------------------------------------------------------------------


class LinkError(CheckpointEngineError, ConnectionError):
    """The channel between a parameter-server rank and an engine worker failed."""


class LinkClosedError(LinkError):
    """The other side is gone: its process ended or closed the channel."""


class LinkRefusedError(LinkError):
    """The two sides may not or cannot talk: wrong token, other user, or another protocol version."""


class DeadlineError(CheckpointEngineError, TimeoutError):
    """Something did not happen within its deadline; the message says what, and how long was waited."""


class EngineRequestError(CheckpointEngineError, RuntimeError):
    """The engine could not be asked to update: unreachable, refused, or it answered with an error."""


class WeightsRejectedError(CheckpointEngineError, ValueError):
    """The engine was offered weights that are not its own: an unknown, missing or misshapen tensor."""


class WorkerError(CheckpointEngineError, RuntimeError):
    """An engine worker failed while it took the update; the message names worker, phase and cause."""


class RankError(CheckpointEngineError, RuntimeError):
    """Another rank of the parameter server failed or died; the message names it and its cause."""


class PeerError(CheckpointEngineError, ConnectionError):
    """The host memory of another parameter server could not be read; the message names it, the range and the cause."""


class PeerMovedError(PeerError):
    """It holds other bytes by now, or is another process: what is known of it is stale. Nothing of it was used."""


class UpdateError(CheckpointEngineError, RuntimeError):
    """An update did not complete. `rank` and `phase` say where; no engine worker serves half of it silently.

    `kind` is the name of the class of the error that came first.
    """

    def __init__(self, message: str, *, rank: int, phase: str, kind: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.kind = kind
