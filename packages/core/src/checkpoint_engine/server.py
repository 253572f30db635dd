"""The parameter server: holds checkpoints in host memory and brings them to running engines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import torch
from typing_extensions import Self

from checkpoint_engine.catalog import Catalog, Holding
from checkpoint_engine.device import Device, open_device
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError, SettingError
from checkpoint_engine.gathered import Gathered, Known
from checkpoint_engine.host.store import CheckpointStore, Registered
from checkpoint_engine.link.messages import ReloadMode
from checkpoint_engine.membership import Membership
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.planning.peers import check_same
from checkpoint_engine.settings import Settings, rank_from_environment
from checkpoint_engine.sharing import Sharing
from checkpoint_engine.transfer.announcement import PlanKeeper
from checkpoint_engine.transfer.feeds import Feed, HostFeed, PeerFeed
from checkpoint_engine.transfer.remote import RingKeeper
from checkpoint_engine.transfer.report import Method, Progress, UpdateReport
from checkpoint_engine.transfer.staging import StagingKeeper
from checkpoint_engine.transfer.trace import RankTrace
from checkpoint_engine.transfer.update import RequestFunction, UpdateOrder, UpdateRun

if TYPE_CHECKING:
    from checkpoint_engine.data_types import MemoryBufferMetaList

Files = Sequence[str | Path] | Mapping[Path, Sequence[str]]

_log = logging.getLogger(__name__)


class ParameterServer:
    """One rank of the parameter server; usually one for each GPU of the engine, on the same host.

    All ranks call `gather_metas` and `update` together. The other methods concern one rank only.

        ps = ParameterServer()                                   # under torchrun
        ps.register_checkpoint("step-7", files=my_share_of_the_files)
        ps.gather_metas("step-7")
        ps.update("step-7", ask_engine)                          # returns once every engine worker serves it
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        auto_pg: bool = True,
        gpu_count: int | None = None,
        mem_fraction: float | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        device: str | None = None,
        staging: str | None = None,
    ) -> None:
        """Opens the device of this rank; the ranks do not meet yet.

        Args:
            rank: This rank; `RANK` if None.
            world_size: Number of ranks; `WORLD_SIZE` if None.
            auto_pg: Whether `gather_metas` and `update` connect the ranks when that was not done yet.
            gpu_count: GPUs of this host; what torch sees if None. Rank r uses GPU r modulo this.
            mem_fraction: Share of the free device memory that staging may take; `PS_MEM_FRACTION` if None.
            master_addr: Host of rank 0; `MASTER_ADDR` if None.
            master_port: A free port there; `MASTER_PORT` if None.
            device: `cpu`, `cuda` or `auto`; `CHECKPOINT_ENGINE_DEVICE` if None.
            staging: `release` to free staging memory after each update, `persistent` to keep it; `PS_STAGING` if None.

        Raises:
            SettingError: an argument or environment variable cannot work.
        """
        self._rank = rank_from_environment(rank, "RANK")
        self._world_size = rank_from_environment(world_size, "WORLD_SIZE")
        if not 0 <= self._rank < self._world_size:
            raise SettingError(f"rank {self._rank} is not one of {self._world_size} ranks")
        self._settings = Settings.from_environment(mem_fraction, device, staging)
        self._membership = Membership(
            self._rank, self._world_size, master_addr=master_addr, master_port=master_port, automatic=auto_pg
        )
        self._device = open_device(self._settings.device, index=_device_index(self._rank, gpu_count), rank=self._rank)
        self._store = CheckpointStore(self._device)
        self._stagings = StagingKeeper(keep=self._settings.keep_staging)
        self._sharing = Sharing(
            self._rank, self._device, _device_index(self._rank, gpu_count), gpu_count or torch.cuda.device_count()
        )
        self._rings = RingKeeper(self._sharing.store)
        self._gathered = Gathered()
        self._plans = PlanKeeper()
        self._busy = threading.Lock()
        self._running: UpdateRun | None = None
        self.progress = Progress()
        self.last_report: UpdateReport | None = None

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def device(self) -> Device:
        """The device of this rank."""
        return self._device

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints registered on this rank."""
        return self._store.names()

    # -- one rank ---------------------------------------------------------------------------------------------------

    def register_checkpoint(
        self,
        name: str,
        *,
        files: Files | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = True,
    ) -> None:
        """Brings this rank's share of a checkpoint into host memory.

        Args:
            name: What to call it.
            files: safetensors files; or for each file the names of the tensors to take from it.
            named_tensors: Tensors on the CPU or a GPU; they are copied.
            use_shared_memory_pool: Keep the memory for the next checkpoint when this one is unregistered.
            use_inplace_pin_memory: Use files that lie in shared memory where they are. They are never deleted.

        Raises:
            CheckpointStateError: the name is taken; the checkpoint of that name stays as it was.
            CheckpointFormatError: a file is missing or broken.
            HostMemoryError: the host's memory is too small.
        """
        self._store.register(
            name,
            files=files,
            named_tensors=named_tensors,
            in_place=use_inplace_pin_memory,
            pool=use_shared_memory_pool,
        )

    def unregister_checkpoint(self, name: str, force: bool = False) -> None:  # noqa: FBT001, FBT002 - a known signature
        """Frees a checkpoint of this rank; with `force`, memory kept for the next one too.

        Raises:
            CheckpointStateError: no such checkpoint, or an update is using it.
        """
        stays = self._store.get(name).pooled and not force
        self._store.unregister(name, force=force, farewell=lambda: self._sharing.withdraw(name))
        self._gathered.forget(name)
        if not stays and self._busy.acquire(blocking=False):  # else the update that runs now has lent what it needs
            try:
                with self._device.active():
                    self._stagings.take_back()
            finally:
                self._busy.release()

    def get_metas(self) -> dict[int, MemoryBufferMetaList]:
        """What all ranks hold of the checkpoint gathered last, by rank, in the form that existing callers know."""
        from checkpoint_engine.data_types import catalog_to_metas  # noqa: PLC0415 - stands above this floor

        return dict(catalog_to_metas(self.catalog()))

    def load_metas(self, metas: Mapping[int, MemoryBufferMetaList]) -> None:
        """Makes known what ranks elsewhere hold, as their `get_metas` gave it; the next update is read from there."""
        from checkpoint_engine.data_types import metas_to_catalog  # noqa: PLC0415 - stands above this floor

        self.load_catalogs([metas_to_catalog(metas)])

    def load_catalogs(self, catalogs: Sequence[Catalog]) -> None:
        """Makes known which parameter servers elsewhere hold a checkpoint; updates to it are read from all of them.

        Raises:
            CheckpointStateError: the catalogs are not of the same checkpoint.
            CheckpointFormatError: one contradicts itself.
        """
        check_same([catalog.validate() for catalog in catalogs])
        self._gathered.note(catalogs[0].name, catalogs, [c.to_json() for c in catalogs], elsewhere=True)

    def catalog(self, name: str | None = None) -> Catalog:
        """What all ranks hold of a checkpoint; of the one gathered or loaded last if no name is given.

        Raises:
            CheckpointStateError: it was not gathered.
        """
        return self._gathered.get(name).replicas[0]

    def abort(self, reason: str) -> bool:
        """Gives up the update that is running, from another thread; returns whether there was one."""
        running = self._running
        if running is None:
            return False
        running.cancel.set(CheckpointEngineError(f"aborted: {reason}"))
        return True

    def release_staging(self) -> int:
        """Frees what was kept for the next update, and makes the engine's worker unmap it; returns bytes freed.

        Raises:
            CheckpointStateError: an update is using it.
        """
        if not self._busy.acquire(blocking=False):
            raise CheckpointStateError("an update is using the staging memory; wait for it, or abort it")
        try:
            with self._device.active():
                freed = self._stagings.kept
                self._stagings.release()
                self._rings.close()
                return freed
        finally:
            self._busy.release()

    def close(self) -> None:
        """Leaves the group of ranks and frees all memory."""
        with self._device.active():
            self._stagings.release()
        self._membership.leave()
        self._rings.close()
        self._sharing.close()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- all ranks together -----------------------------------------------------------------------------------------

    def init_process_group(
        self,
        *,
        master_addr: str | None = None,
        master_port: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        """Connects the ranks, in a group of their own; does nothing if they are connected.

        Update scripts in the wild, SGLang's own among them, call `torch.distributed.barrier()` next, as upstream gives
        torch its default group here. So this call does too, over Gloo, but only in a process that torchrun started as
        this very rank and that has no default group. The price: such a process cannot make a default group of its own
        afterwards. Make it before; or do not call this: `gather_metas` and `update` connect the ranks by themselves,
        and leave torch's default group alone. `close` takes it back.

        Raises:
            SettingError: no address is known.
            AddressInUseError: the port on rank 0 is taken.
            DeadlineError: not all ranks came in time.
        """
        store = self._membership.connect(master_addr, master_port, timeout)
        if store is not None:
            self._membership.lend_default_group(store, timeout)

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Waits until all ranks are here; no collective library is involved.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
        """
        self._membership.group.gather("barrier", b"", timeout, "all ranks being here")

    def gather_metas(self, name: str, *, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Tells all ranks what each of them holds of a checkpoint; ranks that hold nothing take part too.

        With `CHECKPOINT_ENGINE_P2P=1`, whoever gets the metas afterwards can read the memory, see `load_metas`.

        Raises:
            DuplicateTensorError: two ranks hold the same tensor.
            CheckpointStateError: the ranks gather different checkpoints.
            DeadlineError: a rank did not come in time.
        """
        registered = self._store.get(name) if name in self._store.names() else None
        shared = self._sharing.settings.share and registered is not None
        mine = self._sharing.describe(registered, share=shared, sample=shared)
        parts = self._membership.group.gather(
            "metas", msgspec.msgpack.encode((name, mine)), timeout, f"all ranks gathering {name!r}"
        )
        holdings: list[Holding] = []
        for part in parts:
            other, holding = msgspec.msgpack.decode(part, type=tuple[str, Holding])
            if other != name:
                raise CheckpointStateError(f"rank {holding.rank} gathers {other!r} while this rank gathers {name!r}")
            holdings.append(holding)
        if not any(holding.segments for holding in holdings):
            # Ranks that are about to load the metas of others gather first, too.
            _log.warning("no rank has registered %r; an update to it needs register_checkpoint, or load_metas", name)
            return
        self._gathered.note(name, [Catalog(name, tuple(holdings)).validate()], parts, elsewhere=False)

    def update(
        self,
        name: str,
        req_func: RequestFunction,
        *,
        timeout: timedelta = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        version: str | None = None,
        trace: bool = False,
        reload: ReloadMode = "auto",
        keep: bool = False,
        method: Method = "broadcast",
        workers: int = 1,
    ) -> None:
        """Brings a checkpoint to the engine workers of all ranks, or of some, and returns once they have it.

        What was gathered reaches all ranks by broadcast. With `ranks`, only the engines of those are updated, and they
        read the others' host memory; the others take part in the call, undisturbed, and keep their memory as it is
        until it returns. What was loaded with `load_metas` is read from the hosts that hold it.

        Args:
            name: A checkpoint that was gathered or loaded.
            req_func: Called on every rank with (device identity, handle) of all ranks; asks the engines to update.
            timeout: For the whole update.
            ranks: Whose engines are updated; all if None or empty.
            version: What the engines shall call it; the checkpoint's name if None.
            trace: Whether `last_report` shall say when each bucket was copied, broadcast and loaded.
            reload: How the engines take the tensors over: by reload plan as far as it reaches (`auto`), by nothing
                else (`plan`), or by their own loaders (`loader`). With `verify` they are only compared, and
                `last_report.engine` says what was found.
            keep: Whether what is read from other parameter servers stays in host memory, registered under `name`, so
                that these ranks can serve it in turn.
            method: How bytes get from these ranks to the workers: by `broadcast`; `direct`, where each worker copies
                its own slices out of the host memory of all ranks of its host; or `auto`, direct where possible.
            workers: How many engine workers each rank feeds. In a direct update one rank can feed all workers of its
                host, and needs no GPU (`device="cpu"`): rank r feeds the engine's workers `r * workers` and following.

        Raises:
            CheckpointStateError: not gathered, or another update is running.
            UpdateError: it did not complete; the message names the rank, the phase and the cause.
        """
        known = self._gathered.get(name)
        receivers = self._receivers(ranks)
        if keep and not known.elsewhere:
            raise SettingError("keep=True keeps what is read from other parameter servers; these ranks hold it already")
        if method == "direct" and (known.elsewhere or len(receivers) < self._world_size):
            raise SettingError("a direct update goes to all ranks, out of their own memory; leave ranks and metas out")
        if workers < 1 or (workers > 1 and method != "direct"):
            raise SettingError(f"workers={workers}: only in a direct update does a rank feed more than its own worker")
        if keep and name in self._store.names():
            raise CheckpointStateError(f"{name!r} is registered on this rank; unregister it, or leave keep out")
        if not self._busy.acquire(blocking=False):
            raise CheckpointStateError("an update is running on this rank already; wait for it, or abort it")
        try:
            call = self._membership.group.next_call()
            order = UpdateOrder(
                call,
                known.replicas[0],
                known.digest,
                version or name,
                req_func,
                timeout,
                trace=trace,
                reload=reload,
                method=method,
                workers=workers,
            )
            self._run(name, order, known, receivers, keep=keep)
        finally:
            self._busy.release()

    def gather_traces(self, *, timeout: timedelta = timedelta(minutes=1)) -> list[RankTrace]:
        """Tells all ranks what each of them did when in its last update, if that was traced; in order of rank.

        Raises:
            DeadlineError: a rank did not come in time.
        """
        mine = self.last_report and self.last_report.trace
        parts = self._membership.group.gather(
            "traces", msgspec.msgpack.encode(mine), timeout, "all ranks giving traces"
        )
        traces = (msgspec.msgpack.decode(part, type=RankTrace | None) for part in parts)
        return [trace for trace in traces if trace is not None]

    def _run(self, name: str, order: UpdateOrder, known: Known, receivers: tuple[int, ...], *, keep: bool) -> None:
        group = self._membership.group
        with ExitStack() as stack:
            held = stack.enter_context(self._store.use(name)) if name in self._store.names() else None
            feed = self._feed(order, known, receivers, None if known.elsewhere else held, keep=keep)
            self._running = UpdateRun(
                order,
                group=group,
                device=self._device,
                settings=self._settings,
                stagings=self._stagings,
                rings=self._rings,
                plans=self._plans,
                feed=feed,
                progress=self.progress,
                segments=() if held is None else held.segments,
            )
            try:
                self.last_report = self._running.run()
            except CheckpointEngineError:
                group.drop_communicators()  # one may hang half-way through a broadcast; the next update opens another
                raise
            finally:
                self._running = None
                self.progress.phase = "idle"
            if keep and isinstance(feed, PeerFeed) and feed.kept[0]:
                self._store.adopt(name, *feed.kept)

    def _feed(
        self, order: UpdateOrder, known: Known, receivers: tuple[int, ...], held: Registered | None, *, keep: bool
    ) -> Feed:
        """What the update feeds on."""

        def find(bucket: Bucket) -> torch.Tensor:
            if held is None:
                raise CheckpointStateError(f"this rank holds nothing of {order.catalog.name!r}")
            return held.segments[bucket.segment].tensor[bucket.start : bucket.start + bucket.nbytes]

        if not known.elsewhere and len(receivers) == self._world_size:
            return HostFeed(order.catalog, self._world_size, find, self._plans)
        return PeerFeed(
            known.replicas,
            receivers,
            connect=lambda: (self._sharing.store(), self._sharing.describe(held, share=True)),
            device=self._device,
            find=None if known.elsewhere else find,
            keep=keep,
        )

    def _receivers(self, ranks: Sequence[int] | None) -> tuple[int, ...]:
        chosen = tuple(sorted(set(ranks or range(self._world_size))))
        if chosen[0] < 0 or chosen[-1] >= self._world_size:
            raise SettingError(f"ranks={list(ranks or ())}: there are the ranks 0 to {self._world_size - 1}")
        return chosen


def _device_index(rank: int, gpu_count: int | None) -> int:
    count = gpu_count or torch.cuda.device_count()
    return rank % count if count else 0
