"""What the command line and its rank processes say to each other: a line of JSON each."""

from __future__ import annotations

import msgspec

from checkpoint_engine.link.messages import ReloadMode
from checkpoint_engine.transfer.report import Method, UpdateReport


class Job(msgspec.Struct, frozen=True, tag=True):
    """One update, the same for every rank."""

    directory: str
    version: str
    engine: str
    endpoints: tuple[str, ...]
    workers: int
    """Workers of each engine instance; they are fed in order, those of the first instance first."""
    ranks: int = 0
    """Ranks that feed them all, each of them as many; 0 for one rank a worker."""
    pause: str = "keep"
    reset_caches: bool = True
    timeout: float = 600.0
    """Seconds for the update itself."""
    wait: float = 600.0
    """Seconds for an engine that is still starting."""
    save_metas: str | None = None
    reload: ReloadMode = "auto"
    method: Method = "broadcast"
    trace: str | None = None
    """File to which the first rank writes what all ranks did when."""
    metas: tuple[str, ...] = ()
    """Files with the catalogs of other parameter servers, from whose memory the checkpoint is read; then there is no
    directory."""
    keep: bool = False
    """Whether what is read from there stays in host memory, for others to join."""
    number: int = 0
    """Counts the jobs; reports carry it, so that one of an earlier job is not taken for one of this."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Give up a job, because another rank failed."""

    reason: str
    job: int


class Progressed(msgspec.Struct, frozen=True, tag=True):
    """How far a rank is."""

    phase: str
    bytes_done: int = 0
    nbytes: int = 0


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A warning of the library."""

    message: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """A job is done. `seconds` by stage, those before the update included."""

    job: int
    rank: int
    seconds: dict[str, float]
    update: UpdateReport


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A job failed, or the rank could not start (`job` 0).

    `error` is the class of the error; `rank` and `phase` say where an update failed.
    """

    job: int
    error: str
    message: str
    phase: str = ""
    rank: int = 0
    kind: str = ""
    """Where an update failed: the class of the error that came first."""
    engine: str = ""
    """What became of the engine that this rank leads."""
    secondary: bool = False
    """Another rank's failure was the cause."""


FromParent = Job | Abort
FromRank = Progressed | Logged | Done | Failed
