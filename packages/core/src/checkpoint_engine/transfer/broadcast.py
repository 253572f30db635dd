"""Broadcast: what the ranks hold goes to all of their GPUs, bucket by bucket, and from there into the engines.

How the three stages overlap, see `pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from checkpoint_engine.collective import Communicator
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.planning.staging import place_buckets
from checkpoint_engine.transfer.gate import BroadcastGate
from checkpoint_engine.transfer.introduction import Introduction, agreed_generation
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.pipeline import BroadcastPipeline
from checkpoint_engine.transfer.sources import BucketSource, HostSource, find_bucket, is_there
from checkpoint_engine.transfer.staging import choose_staging
from checkpoint_engine.transfer.transport import Prepared, Transport, UpdateContext
from checkpoint_engine.transfer.worker_links import WorkerLinks

__all__ = ["Broadcast"]


class Broadcast(Transport):
    """All ranks are updated, and what they hold is all there is."""

    method = Method.BROADCAST
    yields_to_p2p = True

    def __init__(self, update: UpdateContext) -> None:
        super().__init__(update)
        self._gate: BroadcastGate | None = None
        self._source: BucketSource | None = None
        self._pipeline: BroadcastPipeline | None = None

    @property
    def _index(self) -> int:
        """This rank's among the receivers; buckets name their owner by it."""
        return self._order.receivers.index(self._update.number)

    @property
    def sends_as_it_comes(self) -> bool:
        """Only this rank reads its memory, bucket by bucket."""
        return True

    def introduce(self, mine: Introduction) -> Introduction:
        """With the memory that staging may take, and where this rank counts broadcasts."""
        if not self._update.receives:
            return mine
        held = self._update.held
        # A trainer that lives in this process needs what its allocator has cached for its next step.
        free, _ = self._rank.device.memory(reclaim=held is None or not held.is_of_others)
        free += self._rank.stagings.held(self._rank.device)
        self._gate = BroadcastGate()
        return replace(
            mine,
            available=int(free * self._rank.settings.mem_fraction),
            generation=self._rank.group.generation_of(self._order.receivers),
            gate=self._gate.exported,
        )

    def prepare(self, ranks: Sequence[Introduction], plan: BucketPlan) -> Prepared:
        """Staging, which begins to be filled, and a communicator among the receivers.

        Raises:
            CheckpointStateError: this rank has introduced itself to nobody.
        """
        if self._gate is None:
            raise CheckpointStateError("ranks introduce themselves before a broadcast is prepared")
        receivers, clock = self._order.receivers, self._update.clock
        self._source = self.open_source(plan)
        available = min(ranks[rank].available for rank in receivers)
        device, layout = choose_staging(plan, len(receivers), self._rank.device, available, self._update.number)
        with clock.step("communicator"):
            communicator = self._connect(ranks, device)
        with clock.step("staging"):
            staging = self._rank.stagings.take(device, layout.nbytes)
        self._pipeline = BroadcastPipeline(
            rank=self._index,
            plan=plan,
            ranges=place_buckets(plan, layout, self._index),
            staging=staging,
            device=device,
            communicator=communicator,
            gate=self._gate,
            source=self._source,
            cancel=self._update.cancel,
            progress=self._rank.progress,
            clock=clock,
            sums=self.sums,
        )
        progress = self._rank.progress
        before, progress.phase = progress.phase, Phase.LOAD  # what fails here fails to be loaded, only earlier
        with clock.step("fill staging"):
            self._pipeline.fill()
        progress.phase = before
        where = "host" if device is not self._rank.device else device.torch_device.type
        self.staging = f"{layout.nbytes / 1e6:.1f} MB on {where}, {'one ring' if layout.shared else 'two rings'}"
        return Prepared(staging)

    def open_source(self, plan: BucketPlan) -> BucketSource:
        """Where this rank's own buckets come from."""
        held, name = self._update.held, self._order.catalog.name
        return HostSource(
            lambda index: find_bucket(held, plan.buckets[index], name),
            lambda index: is_there(held, plan.buckets[index]),
            self._update.cancel,
        )

    def run(self, workers: WorkerLinks) -> None:
        """Bucket by bucket."""
        if self._pipeline is None:
            raise CheckpointStateError("a broadcast is prepared before it runs")
        self._pipeline.run(workers.links[0])

    def let_go(self) -> None:
        """See `Transport`; the pipeline has done its part."""
        self._pipeline = None
        super().let_go()

    def close(self) -> None:
        """Stops fetching, if there is anything to fetch."""
        for each in (self._source, self._gate):
            if each is not None:
                each.close()

    def _connect(self, ranks: Sequence[Introduction], device: Device) -> Communicator | None:
        receivers, own = self._order.receivers, self._update.number
        chosen = self._rank.collective if device is self._rank.device else ""
        communicator = self._rank.group.communicator(
            chosen or device.backend,
            device.torch_device,
            device.active,
            agreed_generation(ranks, receivers, self._update.key),
            self._update.deadline,
            receivers,
            self._update.cancel,
        )
        if communicator is not None and self._gate is not None:
            self._update.cancel.on_set(communicator.abort)
            self._gate.meet({rank: gate for rank in receivers if (gate := ranks[rank].gate) and rank != own})
        return communicator
