"""What the command line and its rank processes say to each other: a line of JSON each."""

from __future__ import annotations

import msgspec

from checkpoint_engine.cli.options import Afterwards, Engines, Patience, Requests, TensorChoice, Transfer
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.transfer.report import UpdateReport

__all__ = [
    "UNASKED",
    "AbortJob",
    "Done",
    "FromParent",
    "FromRank",
    "Job",
    "JobFailed",
    "Logged",
    "PeerLost",
    "Progressed",
]

UNASKED = "was asked for nothing yet: it holds what it held"
"""Of an engine, after a failure."""


class Job(msgspec.Struct, frozen=True, tag=True):
    """One update, the same for every rank."""

    directory: str
    version: str
    engines: Engines
    tensors: TensorChoice = TensorChoice()
    transfer: Transfer = Transfer()
    requests: Requests = Requests()
    patience: Patience = Patience()
    afterwards: Afterwards = Afterwards()
    metas: tuple[str, ...] = ()
    """Files with the catalogs of other parameter servers, from whose memory the checkpoint is read; then there is no
    directory."""
    draft: str | None = None
    """Directory of the draft model's own checkpoint, which is brought along."""
    number: int = 0
    """Counts the jobs; reports carry it, so that one of an earlier job is not taken for one of this."""

    @property
    def keep(self) -> bool:
        """Whether what is read from other parameter servers stays in host memory, for others to join."""
        return bool(self.metas) and self.afterwards.keep_serving > 0


class AbortJob(msgspec.Struct, frozen=True, tag=True):
    """Give up a job, because another rank failed."""

    reason: str
    job: int


class Progressed(msgspec.Struct, frozen=True, tag=True):
    """How far a rank is."""

    phase: Phase
    bytes_done: int = 0
    nbytes: int = 0


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A warning of the library."""

    message: str


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """Another rank gives no sign of life; if it is there and says nothing of itself soon, it is to be ended."""

    job: int
    rank: int
    why: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """A job is done. `seconds` by stage, those before the update included."""

    job: int
    rank: int
    seconds: dict[str, float]
    update: UpdateReport


class JobFailed(msgspec.Struct, frozen=True, tag=True):
    """A job failed, or the rank could not start (`job` 0)."""

    job: int
    failure: Failure
    of_update: bool = False
    """Whether it is an update that failed, which may have been so on another rank."""
    engine: str = ""
    """What became of the engine that this rank leads."""
    secondary: bool = False
    """Another rank's failure was the cause."""
    early: bool = False
    """Whether the job had not come to the update itself, and does not: no engine was asked for anything."""


FromParent = Job | AbortJob
FromRank = Progressed | Logged | PeerLost | Done | JobFailed
