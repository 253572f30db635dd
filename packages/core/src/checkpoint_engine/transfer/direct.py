"""Direct: each engine worker takes its own slices out of the ranks' memory; nothing is staged and nothing broadcast.

The ranks of one host export their segments to the worker of each of them, as file descriptors (see `exports`). What
ranks of other hosts hold is fetched, as far as the workers of this one want it (see `remote`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.errors import CheckpointStateError, RankError, SettingError
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.transfer.exports import RING, Export, ExportedSegments, export_segments
from checkpoint_engine.transfer.fill_marks import FillMarks
from checkpoint_engine.transfer.introduction import Introduction
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.remote import RemoteBuckets, unite
from checkpoint_engine.transfer.report import Progress, StageClock
from checkpoint_engine.transfer.sources import find_bucket
from checkpoint_engine.transfer.transport import Prepared, Transport, UpdateContext
from checkpoint_engine.transfer.worker_link import WorkerLink
from checkpoint_engine.transfer.worker_links import WorkerLinks

__all__ = ["Direct", "DirectPipeline", "find_obstacle", "in_turn"]

_MOST_SEGMENTS = 200
"""File descriptors that one message may carry, with room to spare (the kernel's limit is 253)."""

_DEVICE_BUCKETS = 4
"""How many times as much a bucket of device memory holds: its bytes take less time than a worker's hearing of it."""

_BUCKETS_AHEAD = 8
"""Buckets that a worker is told of before it has answered; more would only fill the socket."""


class Direct(Transport):
    """All ranks are updated out of their own memory, and a rank may feed several workers."""

    method = Method.DIRECT

    def __init__(self, update: UpdateContext) -> None:
        super().__init__(update)
        self._plan: BucketPlan | None = None
        self._exported: ExportedSegments | None = None
        self._remote: RemoteBuckets | None = None
        self._marks: FillMarks | None = None

    @classmethod
    def check(cls, order: UpdateOrder) -> None:
        """Workers map memory of all ranks of their host, and of nobody else."""
        if not order.everywhere:
            raise SettingError("a direct update goes to all ranks, out of their own memory; leave ranks and metas out")

    @property
    def numbers_workers(self) -> bool:
        """Where it was asked for, a rank may have no device, or several workers."""
        without_device = not self._rank.device.known_by_identity or self._order.workers > 1
        return self._order.method is Method.DIRECT and without_device

    @property
    def sends_as_it_comes(self) -> bool:
        """Every rank tells its workers of a bucket once its owner has it."""
        return True

    def introduce(self, mine: Introduction) -> Introduction:
        """With what this rank exports, and how far it has filled that."""
        held = self._update.held
        self._marks = FillMarks(self._update.number, held.refill if held is not None else None)
        return replace(mine, export=export_segments(held.segments if held else ()), filling=self._marks.exported)

    def settle(self, ranks: Sequence[Introduction]) -> Transport:
        """This one.

        Raises:
            RankError: it is not possible.
        """
        obstacle = self.find_obstacle(ranks)
        if obstacle:
            raise RankError(f"a direct update is not possible: {obstacle}; --method broadcast does without")
        return self

    def find_obstacle(self, ranks: Sequence[Introduction]) -> str:
        """What keeps these ranks from a direct update; empty if nothing does. Alike on all ranks."""
        exports = [rank.export for rank in ranks if rank.export is not None]
        if len(exports) < len(ranks):
            silent = next(number for number, rank in enumerate(ranks) if rank.export is None)
            return f"rank {silent} exports nothing, since it was asked for another method"
        return find_obstacle(exports, self._order.catalog)

    def plan(self, ranks: Sequence[Introduction]) -> BucketPlan:
        """Larger buckets where no byte of them comes over a bus."""
        del ranks
        catalog, size = self._order.catalog, self._rank.settings.bucket_size
        kinds = {segment.kind for holding in catalog.holdings for segment in holding.segments}
        return self._rank.plans.plan(catalog, size * _DEVICE_BUCKETS if kinds == {"device"} else size)

    def prepare(self, ranks: Sequence[Introduction], plan: BucketPlan) -> Prepared:
        """Exports this host's segments, and a ring for what is fetched from others."""
        with self._update.clock.step("export"):
            exports = {number: rank.export for number, rank in enumerate(ranks) if rank.export is not None}
            host = exports[self._update.number].host
            local = {number: export for number, export in exports.items() if export.host == host}
            self._meet_marks(ranks, local)
            remote = in_turn(plan, self._update.number, [rank.export.host if rank.export else "" for rank in ranks])
            if remote:
                self._remote = RemoteBuckets(plan, self._order.catalog, remote, self._rank.rings)
                local[RING] = export_segments([self._remote.ring])
            self._exported = ExportedSegments(local)
            self._rank.stagings.export(self._exported)
        self._plan = plan
        self.staging = f"none: workers read {len(self._exported.descriptors)} segments"
        return Prepared(self._exported, remote)

    def _meet_marks(self, ranks: Sequence[Introduction], local: Mapping[int, Export]) -> None:
        if self._marks is None:
            raise CheckpointStateError("ranks introduce themselves before a direct update is prepared")
        others = ((number, export) for number, export in local.items() if number != self._update.number)
        self._marks.meet({
            number: (export, mark) for number, export in others if (mark := ranks[number].filling) is not None
        })  # fmt: skip
        if len(local) < len(ranks):
            with self._update.clock.step("fill"):  # other hosts see no mark, and read once all ranks are connected
                self._marks.wait_for_own(self._update.cancel.check)

    def run(self, workers: WorkerLinks) -> None:
        """Tells the workers where every bucket lies."""
        if self._plan is None or self._exported is None or self._marks is None:
            raise CheckpointStateError("a direct update is prepared before it runs")
        if self._remote is not None:
            self._remote.start(unite(workers.wanted), self._update.cancel)
        DirectPipeline(
            plan=self._plan,
            exported=self._exported,
            links=workers.links,
            remote=self._remote,
            marks=self._marks,
            cancel=self._update.cancel,
            progress=self._rank.progress,
            clock=self._update.clock,
            take_sums=self._take_sums,
        ).run()
        if self._remote is not None:
            self._remote.complete = True

    def _take_sums(self, index: int) -> None:
        if self.sums is None or self._plan is None:
            return
        bucket = self._plan.buckets[index]
        if bucket.owner == self._update.number:
            self.sums.take(index, find_bucket(self._update.held, bucket, self._order.catalog.name))

    def close(self) -> None:
        """Stops fetching. What is exported stays, and with it what workers have mapped."""
        for each in (self._remote, self._marks):
            if each is not None:
                each.close()


def in_turn(plan: BucketPlan, rank: int, hosts: Sequence[str]) -> list[int]:
    """The buckets that ranks of other hosts own, in the order in which `rank` reads them; `hosts[r]` is that of rank r.

    All ranks read at once: each goes from host to host, beginning with the next, and on each from rank to rank,
    beginning with that of its own place; so no two ask the same one. The first buckets of all owners come before the
    second ones, since those may hold shards of the same tensors.
    """
    of_host: dict[str, list[int]] = {}
    for other, host in enumerate(hosts):
        of_host.setdefault(host, []).append(other)
    numbers = {host: number for number, host in enumerate(of_host)}
    places = {other: place for ranks in of_host.values() for place, other in enumerate(ranks)}
    turns: Counter[int] = Counter()
    keys: dict[int, tuple[int, int, int]] = {}
    for index, bucket in enumerate(plan.buckets):
        owner, host = bucket.owner, hosts[bucket.owner]
        if host != hosts[rank]:
            onward = (numbers[host] - numbers[hosts[rank]]) % len(numbers)
            keys[index] = turns[owner], onward, (places[owner] - places[rank]) % len(of_host[host])
            turns[owner] += 1
    return sorted(keys, key=keys.__getitem__)


def find_obstacle(exports: Sequence[Export], catalog: Catalog) -> str:
    """What keeps ranks that export this from a direct update; empty if nothing does.

    Between hosts, ranks fetch what their workers lack; `catalog` says whether the others' memory can be read.
    """
    silent = [
        holding.rank
        for holding in catalog.holdings
        if any(segment.tensors for segment in holding.segments) and not (holding.p2p_address and holding.generation)
    ]
    for rank, export in enumerate(exports):
        if export.obstacle:
            return f"rank {rank}: {export.obstacle}"
        if export.host != exports[0].host and silent:
            return (
                f"ranks 0 and {rank} are on different hosts, or in containers that do not see each other's processes, "
                f"and rank {silent[0]} does not let others read its memory (CHECKPOINT_ENGINE_P2P=1, or --share)"
            )
    of_host: dict[str, int] = {}
    for export in exports:
        of_host[export.host] = of_host.get(export.host, 1) + sum(segment.descriptors for segment in export.segments)
    count = max(of_host.values(), default=0)
    most = _MOST_SEGMENTS
    return f"{count} blocks of memory are more than the {most} that can be exported" if count > most else ""


class DirectPipeline:
    """One rank's part: tells its workers where every bucket lies, and waits until they have taken them."""

    def __init__(
        self,
        *,
        plan: BucketPlan,
        exported: ExportedSegments,
        links: Sequence[WorkerLink],
        remote: RemoteBuckets | None,
        marks: FillMarks,
        cancel: Cancel,
        progress: Progress,
        clock: StageClock,
        take_sums: Callable[[int], None],
    ) -> None:
        self._plan = plan
        self._exported = exported
        self._links = links
        self._remote = remote
        self._fetched = frozenset(remote.indexes if remote is not None else ())
        self._marks = marks
        self._sent: list[int] = []
        """Buckets in the order in which the workers were told of them."""
        self._released = 0
        self._cancel = cancel
        self._progress = progress
        self._clock = clock
        self._take_sums = take_sums

    def run(self) -> None:
        """Returns once the workers have taken everything.

        Raises:
            CheckpointEngineError: a worker failed, another rank did, or the deadline is over.
        """
        remote = deque(self._remote.indexes if self._remote is not None else ())
        local = deque(index for index in range(len(self._plan.buckets)) if index not in self._fetched)
        while remote or local:
            self._cancel.check()
            self._settle(len(self._sent) - _BUCKETS_AHEAD)
            # Whatever comes from other hosts is passed on as it comes; in between, what lies here.
            if remote and self._remote is not None and (not local or self._remote.source.ready(remote[0])):
                self._pass_on(self._remote, remote.popleft())
            else:
                self._send(local.popleft())
        self._settle(len(self._sent))
        self._clock.add("load", max(sum(seconds for _, seconds in link.loads.values()) for link in self._links))
        if self._clock.trace is not None:
            for link in self._links:
                self._clock.trace.spans += link.spans(self._plan)
            self._clock.trace.spans += self._remote.spans() if self._remote is not None else []

    def _send(self, index: int) -> None:
        bucket = self._plan.buckets[index]
        self._marks.wait(bucket, self._cancel.check)
        for link in self._links:
            link.load(index, bucket.start, self._exported.number(bucket.owner, bucket.segment))
        self._sent.append(index)
        self._take_sums(index)

    def _pass_on(self, remote: RemoteBuckets, index: int) -> None:
        if not remote.source.ready(index):
            self._settle(len(self._sent))  # it may wait for memory that the workers hold
        offset = remote.offset_of(index)
        for link in self._links:
            link.load(index, offset, self._exported.number(RING, 0), again=True)
        self._sent.append(index)

    def _settle(self, count: int) -> None:
        """Waits until all workers have loaded so many of the buckets, and gives back what those were in."""
        for link in self._links:
            link.wait_until_loaded(count)
        done = self._sent[self._released : min(len(link.loads) for link in self._links)]
        for index in done:
            self._progress.bytes_done += self._plan.buckets[index].nbytes
            if self._remote is not None and index in self._fetched:
                self._remote.source.release(index)
        self._released += len(done)
        self._progress.buckets_done = self._released
