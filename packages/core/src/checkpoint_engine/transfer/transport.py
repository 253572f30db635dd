"""What a transport is: one object for one update on one rank, which brings its bytes to the engine's workers.

Its life: `introduce`, `settle`, `plan`, `prepare`, `run`, `confirm`, `let_go`, `finished`, `close`. Whatever goes
wrong, `close` comes last. On ranks whose engines are not updated it ends with `plan`. A new transport is a class here
beside the others, a name in `methods` and a line in `transports`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from checkpoint_engine.catalog import Holding, SegmentEntry
from checkpoint_engine.collective import RankGroup
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import Device, ExportedMemory
from checkpoint_engine.errors import SettingError
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.settings import Settings
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import Registered
from checkpoint_engine.transfer.announcement import PlanCache
from checkpoint_engine.transfer.introduction import Introduction
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.remote import RingCache
from checkpoint_engine.transfer.report import Progress, StageClock
from checkpoint_engine.transfer.sent_sums import SentSums
from checkpoint_engine.transfer.staging import StagingCache
from checkpoint_engine.transfer.worker_links import WorkerLinks

__all__ = ["Prepared", "RankResources", "Transport", "UpdateContext"]


@dataclass(frozen=True)
class RankResources:
    """What one rank brings to every update; most of it outlives them."""

    group: RankGroup
    device: Device
    settings: Settings
    collective: str
    """What broadcasts tensors of the device; empty for the device's own choice."""
    stagings: StagingCache
    rings: RingCache
    plans: PlanCache
    connect: Callable[[Registered | None], tuple[P2PStore, Holding]]
    """Opens this rank's end of transfers between hosts, and says how what it holds is reached."""
    progress: Progress


@dataclass(frozen=True)
class UpdateContext:
    """One update on one rank: what a transport works with."""

    order: UpdateOrder
    key: str
    """Names the update, alike on all ranks."""
    rank: RankResources
    held: Registered | None
    """This rank's part of the checkpoint."""
    deadline: Deadline
    cancel: Cancel
    clock: StageClock

    @property
    def number(self) -> int:
        """This rank's."""
        return self.rank.group.board.rank

    @property
    def receives(self) -> bool:
        """Whether this rank's engine is updated."""
        return self.number in self.order.receivers


@dataclass(frozen=True)
class Prepared:
    """What an engine worker is told before anything moves."""

    memory: ExportedMemory
    """Where buckets will lie."""
    remote: Sequence[int] = ()
    """Buckets of which the worker is to say what it wants: only that is fetched."""


class Transport(ABC):
    """One way for bytes to travel."""

    method: ClassVar[Method]
    """What it is called in reports."""
    yields_to_p2p: ClassVar[bool] = False
    """Whether P2P takes its place where that is needed; else it refuses."""
    sums: SentSums | None = None
    """Takes the checksums of what this rank sends, where somebody wants them; from `plan` on."""
    staging = "none"
    """For people: through which memory the bytes went."""

    def __init__(self, update: UpdateContext) -> None:
        self._update = update
        self._rank = update.rank
        self._order = update.order

    @classmethod
    def check(cls, order: UpdateOrder) -> None:
        """Refuses an order that this transport cannot carry out.

        Raises:
            SettingError: it is one.
        """
        if order.workers > 1:
            raise SettingError(
                f"workers={order.workers}: only in a direct update does a rank feed more than its own worker"
            )

    @property
    def numbers_workers(self) -> bool:
        """Whether workers are called by number, since this rank does not know their devices."""
        return False

    @property
    def sends_as_it_comes(self) -> bool:
        """Whether it begins while bytes are still on their way into this rank's memory, and waits for each bucket."""
        return False

    @property
    def arrived(self) -> tuple[list[Segment], list[SegmentEntry]] | None:
        """What was read and is to stay on this rank, after `finished`: segments, and what is in them."""
        return None

    def introduce(self, mine: Introduction) -> Introduction:
        """What this rank tells the others, with all that the transport adds to it.

        Raises:
            CheckpointEngineError: this rank cannot take part.
        """
        return mine

    def settle(self, ranks: Sequence[Introduction]) -> Transport:
        """The transport that does it, now that all ranks are known: mostly this one. Alike on all ranks.

        Raises:
            RankError: it cannot be done.
        """
        del ranks
        return self

    def plan(self, ranks: Sequence[Introduction]) -> BucketPlan:
        """The buckets; the owner of each is a rank's index among the receivers. Alike on all ranks."""
        del ranks
        return self._rank.plans.plan(self._order.catalog, self._rank.settings.bucket_size)

    @abstractmethod
    def prepare(self, ranks: Sequence[Introduction], plan: BucketPlan) -> Prepared:
        """Makes memory ready, and connections between the ranks.

        Raises:
            CheckpointEngineError: it cannot be done.
        """

    @abstractmethod
    def run(self, workers: WorkerLinks) -> None:
        """Brings everything to this rank's workers, which have mapped the memory; returns once they have taken it.

        Raises:
            CheckpointEngineError: a worker failed, another rank did, or the deadline is over.
        """

    def confirm(self) -> None:  # noqa: B027 - most read what these ranks hold, who look at it themselves
        """Makes sure, once everything is loaded and before the engines go on with it, that it is what it should be.

        Raises:
            PeerMovedError: its holder had something else by then.
        """

    def let_go(self) -> None:
        """Frees memory for one update that no worker has mapped any more, while the engines complete the update."""
        self._rank.stagings.free_unless_kept()

    def finished(self) -> None:  # noqa: B027 - most have nothing to do
        """All engines have completed the update."""

    def close(self) -> None:  # noqa: B027 - see above
        """Frees what belongs to this update."""
