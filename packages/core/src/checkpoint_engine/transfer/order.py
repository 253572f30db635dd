"""What an update is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import get_args

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.contract.modes import Operation, ReloadMode
from checkpoint_engine.errors import SettingError
from checkpoint_engine.transfer.methods import Method

__all__ = ["MOST_WORKERS", "RequestFunction", "UpdateOrder"]

MOST_WORKERS = 1024
"""That one rank feeds: a host has fewer."""

RequestFunction = Callable[[list[tuple[str, str]]], None]
"""Gets (device identity, handle) of all ranks in order of rank, and asks the engine to update with them."""


@dataclass(frozen=True)
class UpdateOrder:
    """What is to be done, the same on every rank."""

    name: str
    """Of the checkpoint."""
    replicas: tuple[Catalog, ...]
    """Who holds it: these ranks, or each of several parameter servers elsewhere."""
    digest: str
    """Stands for all that, with all offsets."""
    remote: bool
    """Whether it is held elsewhere."""
    ranks: int
    """How many there are."""
    receivers: tuple[int, ...]
    """Ranks whose engine workers are updated, ascending."""
    version: str
    ask_engine: RequestFunction
    timeout: timedelta
    trace: bool = False
    operation: Operation = Operation.REPLACE
    reload: ReloadMode = "auto"
    method: Method = Method.BROADCAST
    keep: bool = False
    """Whether what is read from elsewhere stays in host memory."""
    workers: int = 1
    """Engine workers that each rank feeds."""
    partial: bool = False
    """Whether `replicas` were narrowed down to a part of the checkpoint's tensors."""
    rollback: bool = False
    """Whether engines get back what the update before brought, should this one fail half-way."""

    checksum: bool = False
    """Whether what arrives is compared with what was sent, and what copies have written with what arrived."""

    def __post_init__(self) -> None:
        """Refuses what no transport could do.

        Raises:
            SettingError: it is one of these.
        """
        if not self.receivers or self.receivers[0] < 0 or self.receivers[-1] >= self.ranks:
            raise SettingError(f"ranks={list(self.receivers)}: there are the ranks 0 to {self.ranks - 1}")
        if self.keep and not self.remote:
            raise SettingError("keep=True keeps what is read from other parameter servers; these ranks hold it already")
        if self.reload not in get_args(ReloadMode):
            raise SettingError(f"reload={self.reload!r}: there are {', '.join(get_args(ReloadMode))}, and verify")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise SettingError(f"workers={self.workers}: a rank feeds at least one, and at most {MOST_WORKERS}")

    @property
    def catalog(self) -> Catalog:
        """Who holds the checkpoint, as the first that was learned of."""
        return self.replicas[0]

    @property
    def everywhere(self) -> bool:
        """Whether all ranks are updated, and what they hold is all there is."""
        return not self.remote and len(self.receivers) == self.ranks
