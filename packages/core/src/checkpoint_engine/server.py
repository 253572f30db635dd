"""The parameter server: holds checkpoints in host memory and brings them to running engines."""

from __future__ import annotations

import hashlib
import socket
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

from checkpoint_engine import distributed
from checkpoint_engine.catalog import Catalog, Holding
from checkpoint_engine.collective import RankGroup, open_store
from checkpoint_engine.device import Device, open_device
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError, SettingError
from checkpoint_engine.host.store import CheckpointStore
from checkpoint_engine.link.messages import ReloadMode
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.settings import Settings, rank_from_environment
from checkpoint_engine.transfer.report import Progress, UpdateReport
from checkpoint_engine.transfer.trace import RankTrace
from checkpoint_engine.transfer.update import BroadcastUpdate, RequestFunction, UpdateOrder

if TYPE_CHECKING:
    from checkpoint_engine.data_types import MemoryBufferMetaList

Files = Sequence[str | Path] | Mapping[Path, Sequence[str]]


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

        Raises:
            SettingError: an argument or environment variable cannot work.
        """
        self._rank = rank_from_environment(rank, "RANK")
        self._world_size = rank_from_environment(world_size, "WORLD_SIZE")
        if not 0 <= self._rank < self._world_size:
            raise SettingError(f"rank {self._rank} is not one of {self._world_size} ranks")
        self._settings = Settings.from_environment(mem_fraction, device)
        self._master = (master_addr, master_port)
        self._auto_pg = auto_pg
        self._device = open_device(self._settings.device, index=_device_index(self._rank, gpu_count), rank=self._rank)
        self._store = CheckpointStore(self._device)
        self._gathered: dict[str, tuple[Catalog, str]] = {}
        self._latest = ""
        self._group: RankGroup | None = None
        self._facade: distributed.DistributedProcessGroup | None = None
        self._busy = threading.Lock()
        self._running: BroadcastUpdate | None = None
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
        self._store.unregister(name, force=force)
        self._gathered.pop(name, None)

    def get_metas(self) -> dict[int, MemoryBufferMetaList]:
        """What all ranks hold of the checkpoint gathered last, by rank, in the form that existing callers know."""
        from checkpoint_engine.data_types import catalog_to_metas  # noqa: PLC0415 - stands above this floor

        return dict(catalog_to_metas(self.catalog(self._latest)))

    def load_metas(self, metas: Mapping[int, MemoryBufferMetaList]) -> None:
        """Makes known what ranks elsewhere hold, as their `get_metas` gave it."""
        from checkpoint_engine.data_types import metas_to_catalog  # noqa: PLC0415 - stands above this floor

        catalog = metas_to_catalog(metas).validate()
        self._gathered[catalog.name] = (catalog, _digest([catalog.to_json()]))
        self._latest = catalog.name

    def catalog(self, name: str) -> Catalog:
        """What all ranks hold of a checkpoint.

        Raises:
            CheckpointStateError: it was not gathered.
        """
        return self._gathered_as(name)[0]

    def abort(self, reason: str) -> bool:
        """Gives up the update that is running, from another thread; returns whether there was one."""
        running = self._running
        if running is None:
            return False
        running.cancel.set(CheckpointEngineError(f"aborted: {reason}"))
        return True

    def close(self) -> None:
        """Leaves the group of ranks and frees all host memory."""
        self._disconnect()
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

        Raises:
            SettingError: no address is known.
            AddressInUseError: the port on rank 0 is taken.
            DeadlineError: not all ranks came in time.
        """
        if self._group is None:
            known_addr, known_port = self._master
            store = open_store(
                self._rank, self._world_size, master_addr or known_addr, master_port or known_port, timeout
            )
            self._group = RankGroup(store, self._rank, self._world_size)
            # Update scripts call checkpoint_engine.distributed.barrier() once this has returned.
            self._facade = distributed.adopt(store, self._rank, self._world_size, timeout)

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Waits until all ranks are here; no collective library is involved.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
        """
        self._connected().gather("barrier", b"", timeout, "all ranks being here")

    def gather_metas(self, name: str, *, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Tells all ranks what each of them holds of a checkpoint; ranks that hold nothing take part too.

        Raises:
            DuplicateTensorError: two ranks hold the same tensor.
            CheckpointStateError: no rank holds anything of that name.
            DeadlineError: a rank did not come in time.
        """
        held = self._store.get(name).entries if name in self._store.names() else []
        mine = Holding(self._rank, socket.gethostname(), self._device.identity, tuple(held))
        parts = self._connected().gather(
            "metas", msgspec.msgpack.encode((name, mine)), timeout, f"all ranks gathering {name!r}"
        )
        holdings: list[Holding] = []
        for part in parts:
            other, holding = msgspec.msgpack.decode(part, type=tuple[str, Holding])
            if other != name:
                raise CheckpointStateError(f"rank {holding.rank} gathers {other!r} while this rank gathers {name!r}")
            holdings.append(holding)
        if not any(holding.segments for holding in holdings):
            raise CheckpointStateError(f"no rank has registered {name!r}; call register_checkpoint first")
        self._gathered[name] = (Catalog(name, tuple(holdings)).validate(), _digest(parts))
        self._latest = name

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
    ) -> None:
        """Brings a checkpoint to all engine workers of all ranks, and returns once they have it.

        Args:
            name: A gathered checkpoint.
            req_func: Called on every rank with (device identity, handle) of all ranks; asks the engines to update.
            timeout: For the whole update.
            ranks: Only None, or all ranks: transfers to a few ranks need the P2P method.
            version: What the engines shall call it; the checkpoint's name if None.
            trace: Whether `last_report` shall say when each bucket was copied, broadcast and loaded.
            reload: How the engines take the tensors over: by reload plan as far as it reaches (`auto`), by nothing
                else (`plan`), or by their own loaders (`loader`).

        Raises:
            CheckpointStateError: not gathered, or another update is running.
            UpdateError: it did not complete; the message names the rank, the phase and the cause.
        """
        catalog, digest = self._gathered_as(name)
        if ranks and sorted(ranks) != list(range(self._world_size)):
            raise SettingError(
                f"ranks={list(ranks)}: updating a part of the ranks needs the P2P method, which this version does not "
                "have yet; leave ranks out to update all of them"
            )
        if not self._busy.acquire(blocking=False):
            raise CheckpointStateError("an update is running on this rank already; wait for it, or abort it")
        try:
            call = self._connected().next_call()
            self._run(UpdateOrder(call, catalog, digest, version or name, req_func, timeout, trace, reload))
        finally:
            self._busy.release()

    def gather_traces(self, *, timeout: timedelta = timedelta(minutes=1)) -> list[RankTrace]:
        """Tells all ranks what each of them did when in its last update, if that was traced; in order of rank.

        Raises:
            DeadlineError: a rank did not come in time.
        """
        mine = self.last_report and self.last_report.trace
        parts = self._connected().gather("traces", msgspec.msgpack.encode(mine), timeout, "all ranks giving traces")
        traces = (msgspec.msgpack.decode(part, type=RankTrace | None) for part in parts)
        return [trace for trace in traces if trace is not None]

    def _run(self, order: UpdateOrder) -> None:
        group = self._connected()
        with ExitStack() as stack:
            name = order.catalog.name
            held = stack.enter_context(self._store.use(name)) if name in self._store.names() else None
            segments = held.segments if held else []

            def read(bucket: Bucket) -> torch.Tensor:
                return segments[bucket.segment].tensor[bucket.start : bucket.start + bucket.nbytes]

            self._running = BroadcastUpdate(
                order,
                group=group,
                device=self._device,
                settings=self._settings,
                read=read,
                progress=self.progress,
            )
            try:
                self.last_report = self._running.run()
            except CheckpointEngineError:
                group.drop_communicators()  # one may hang half-way through a broadcast; the next update opens another
                raise
            finally:
                self._running = None
                self.progress.phase = "idle"

    def _gathered_as(self, name: str) -> tuple[Catalog, str]:
        if name not in self._gathered:
            raise CheckpointStateError(f"{name!r} was not gathered; call gather_metas({name!r}) on all ranks first")
        return self._gathered[name]

    def _connected(self) -> RankGroup:
        if self._group is None:
            if not self._auto_pg:
                raise CheckpointStateError("the ranks are not connected; call init_process_group on all ranks first")
            self.init_process_group()
        if self._group is None:
            raise CheckpointStateError("the group of ranks was closed")
        return self._group

    def _disconnect(self) -> None:
        if self._group is not None:
            self._group.drop_communicators()
            self._group.board.leave()
            self._group = None
            distributed.destroy_process_group(self._facade)


def _device_index(rank: int, gpu_count: int | None) -> int:
    count = gpu_count or torch.cuda.device_count()
    return rank % count if count else 0


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
