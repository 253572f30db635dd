"""The parameter server: holds checkpoints in host memory and brings them to running engines."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
from typing_extensions import Self

from checkpoint_engine.catalog import Catalog, Holding
from checkpoint_engine.collective import check_backend
from checkpoint_engine.contract.figures import ComparisonFigures
from checkpoint_engine.contract.modes import ReloadMode, WireMode, mode_of, operation_of
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import Device, accelerator_count, open_device
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import (
    CheckpointStateError,
    SettingError,
)
from checkpoint_engine.planning.peers import check_same
from checkpoint_engine.server.copies import CopyCheck
from checkpoint_engine.server.gathered import GatheredCatalogs
from checkpoint_engine.server.host_sums import HostSums
from checkpoint_engine.server.membership import Membership
from checkpoint_engine.server.not_a_number import refuse_nan
from checkpoint_engine.server.sharing import Sharing
from checkpoint_engine.server.update_events import UpdateEvents
from checkpoint_engine.server.update_runner import UpdateRunner
from checkpoint_engine.settings import Settings, rank_from_environment
from checkpoint_engine.source.loader import Files
from checkpoint_engine.source.safetensors_file import Opener
from checkpoint_engine.source.shards import NamedTensors
from checkpoint_engine.source.store import CheckpointStore, Registered, identity_of
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import RequestFunction, UpdateOrder
from checkpoint_engine.transfer.report import Progress, UpdateReport
from checkpoint_engine.transfer.trace import RankTrace

if TYPE_CHECKING:
    from checkpoint_engine.data_types import MemoryBufferMetaList

__all__ = ["Files", "ParameterServer"]


_log = logging.getLogger(__name__)


class ParameterServer:
    """One rank of the parameter server; usually one for each GPU of the engine, on the same host.

    All ranks call `gather_metas` and `update` together. The other methods concern one rank only.

        ps = ParameterServer()                                   # under torchrun
        ps.register_checkpoint("step-7", files=my_share_of_the_files)
        ps.gather_metas("step-7")
        ps.update("step-7", ask_engine)                          # returns once every engine worker serves it
    """

    shared_memory_pool_name = "__shared_memory_pool__"
    """What upstream calls the pool; here it is no checkpoint, and `unregister_checkpoint(..., force=True)` frees it."""

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
        events: str | None = None,
    ) -> None:
        """Opens the device of this rank; the ranks do not meet yet.

        Args:
            rank: This rank; `RANK` if None.
            world_size: Number of ranks; `WORLD_SIZE` if None.
            auto_pg: Whether `gather_metas` and `update` connect the ranks when that was not done yet. They do so anyway
                where nothing needs to be known for it: for a single rank, and in a process whose torch has a default
                group of these very ranks.
            gpu_count: GPUs of this host; what torch sees if None. Rank r uses GPU r modulo this.
            mem_fraction: Share of the free device memory that staging may take; `PS_MEM_FRACTION` if None.
            master_addr: Host of rank 0; `MASTER_ADDR` if None.
            master_port: A free port there; `MASTER_PORT` if None.
            device: `cpu`, `cuda` or `auto`; `CHECKPOINT_ENGINE_DEVICE` if None.
            staging: `release` to free staging memory after each update, `persistent` to keep it; `PS_STAGING` if None.
            events: Where rank 0 publishes what becomes of updates: `tcp://HOST:PORT` (and the next port) or
                `ipc:///PATH`; `CHECKPOINT_ENGINE_EVENTS` if None. See `checkpoint_engine.events`.

        Raises:
            SettingError: an argument or environment variable cannot work.
        """
        self._rank = rank_from_environment(rank, "RANK")
        self._world_size = rank_from_environment(world_size, "WORLD_SIZE")
        if not 0 <= self._rank < self._world_size:
            raise SettingError(f"rank {self._rank} is not one of {self._world_size} ranks")
        self._settings = Settings.from_environment(mem_fraction, device, staging)
        collective = check_backend(self._settings.collective)
        self._membership = Membership(
            self._rank, self._world_size, master_addr=master_addr, master_port=master_port, automatic=auto_pg
        )
        self._device = open_device(self._settings.device, index=_device_index(self._rank, gpu_count), rank=self._rank)
        self._store = CheckpointStore(self._device)
        self._sharing = Sharing(
            self._rank, self._device, _device_index(self._rank, gpu_count), gpu_count or accelerator_count()
        )
        self._gathered = GatheredCatalogs()
        self._copies = CopyCheck()
        self._steps: dict[str, int] = {}
        """How many steps of each training loop have succeeded."""
        self._to_remove: dict[str, Mapping[Path, tuple[int, int]]] = {}
        self._events = UpdateEvents(events, self._rank)
        self._updates = UpdateRunner(
            self._membership, self._device, self._settings, collective, self._store, self._sharing, self._events
        )

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
    def device_manager(self) -> DeviceManager:
        """What type of device this process uses."""
        return DeviceManager()

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints registered on this rank."""
        return self._store.names()

    @property
    def progress(self) -> Progress:
        """How far the update that runs has come."""
        return self._updates.progress

    @property
    def last_report(self) -> UpdateReport | None:
        """What the last update that succeeded has to tell."""
        return self._updates.last_report

    # -- one rank ---------------------------------------------------------------------------------------------------

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Files | None = None,
        named_tensors: NamedTensors | None = None,
        use_shared_memory_pool: bool | None = None,
        use_inplace_pin_memory: bool = True,
        in_place: bool = False,
        opener: Opener = os.open,
        checksum: bool | None = None,
        remove_files: bool = False,
    ) -> None:
        """Brings this rank's share of a checkpoint into host memory, or leaves it where it is.

        Args:
            checkpoint_name: What to call it.
            files: safetensors files; or for each file the names of the tensors to take from it.
            named_tensors: Tensors on the CPU or a GPU; they are copied. Of one that is spread over ranks each gives
                what it has: a `DTensor`, or one or more `TensorShard`s. Ranks may hold the same, byte for byte.
            use_shared_memory_pool: Whether the memory stays for the next checkpoint when this one is unregistered; if
                None, where tensors come from memory and none from files: a trainer's next ones will be alike.
            use_inplace_pin_memory: Use files that lie in shared memory where they are. They are never deleted.
            in_place: Copy nothing of `named_tensors` that lies on this rank's device: engines' workers of this host map
                it and copy from there. Whoever owns the tensors may change them between updates, and then updates
                again; during one they stay as they are. What others cannot map is copied, which the log says.
            opener: How files are opened, by path and flags; it may raise `AccessRefusedError`.
            checksum: Whether every update compares checksums of all tensors in this rank's host memory with those that
                they had when they were registered, before and after their bytes are sent; a flipped bit is refused by
                the tensor's name. `CHECKPOINT_ENGINE_CHECKSUM` if None. `publish` never does of tensors.
            remove_files: Once the checkpoint is unregistered, remove those of `files` that were used where they lie, so
                that their memory is free. Without it no file is ever removed.

        Raises:
            CheckpointStateError: the name is taken; the checkpoint of that name stays as it was.
            CheckpointFormatError: a file is missing or broken.
            HostMemoryError: the host's memory is too small.
        """
        if not isinstance(checkpoint_name, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers need not be typed
            raise SettingError(f"the checkpoint is called {checkpoint_name!r}; names are text")
        self._store.register(
            checkpoint_name,
            files=files,
            named_tensors=named_tensors,
            in_place=use_inplace_pin_memory,
            pool=bool(named_tensors) and not files if use_shared_memory_pool is None else use_shared_memory_pool,
            tensors_stay=in_place,
            opener=opener,
        )
        if self._settings.checksum if checksum is None else checksum:
            try:
                sums = HostSums(self._store.get(checkpoint_name))
                self._store.watch_bytes(checkpoint_name, sums.check, sums.entries())
            except BaseException:
                self._store.unregister(checkpoint_name)
                raise
        if remove_files:
            self._to_remove[checkpoint_name] = self._store.get(checkpoint_name).identities_in_place

    def refuse_nan(self, checkpoint_name: str, *, timeout: timedelta = timedelta(minutes=10)) -> None:
        """Looks at what this rank holds of a checkpoint, where it lies; call it before `update`, on all ranks.

        Raises:
            WeightsRejectedError: tensors hold NaN; the message names them.
            CheckpointStateError: no checkpoint of that name is registered.
        """
        with self._store.use(checkpoint_name) as registered:
            refuse_nan(registered, Deadline(timeout.total_seconds()))

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:  # noqa: FBT001, FBT002 - known
        """Frees a checkpoint of this rank; with `force`, memory kept for the next one too.

        A name that is not registered is only warned of: update scripts clean up whatever came of registering.

        Raises:
            CheckpointStateError: an update is using it.
        """
        if checkpoint_name not in self._store.names():
            _log.warning("checkpoint %r is not registered: there is nothing to unregister", checkpoint_name)
            self._gathered.forget(checkpoint_name)
            return
        registered = self._store.get(checkpoint_name)
        stays = registered.pooled and not force and not registered.is_of_others
        self._store.unregister(
            checkpoint_name, force=force, farewell=lambda: self._part_with(checkpoint_name, stays=stays)
        )
        self._gathered.forget(checkpoint_name)
        for file, identity in self._to_remove.pop(checkpoint_name, {}).items():
            if file.exists() and identity == identity_of(file.stat()):  # else another has taken its place
                file.unlink()

    def get_metas(self) -> dict[int, MemoryBufferMetaList]:
        """What all ranks hold of the checkpoint gathered last, by rank, in the form that existing callers know.

        Others can read by them only what is shared, see `gather_metas`; if nothing is, a warning says so once.
        """
        from checkpoint_engine.data_types import catalog_to_metas  # noqa: PLC0415 - stands above this floor

        metas = catalog_to_metas(self.catalog())
        self._sharing.remind()
        return metas

    def load_metas(self, metas: Mapping[int, MemoryBufferMetaList]) -> None:
        """Makes known what ranks elsewhere hold, as their `get_metas` gave it; the next update is read from there.

        Whatever they call it: an update under a name that nobody has gathered or loaded is one to these metas.
        """
        from checkpoint_engine.data_types import metas_to_catalog  # noqa: PLC0415 - stands above this floor

        self.load_catalogs([metas_to_catalog(metas)])
        self._gathered.accept_any_name()

    def load_catalogs(self, catalogs: Sequence[Catalog]) -> None:
        """Makes known which parameter servers elsewhere hold a checkpoint; updates to it are read from all of them.

        Raises:
            CheckpointStateError: the catalogs are not of the same checkpoint.
            CheckpointFormatError: one contradicts itself.
        """
        check_same([catalog.validate() for catalog in catalogs])
        self._gathered.note(catalogs[0].name, catalogs, [c.to_json() for c in catalogs], remote=True)

    def catalog(self, name: str | None = None) -> Catalog:
        """What all ranks hold of a checkpoint; of the one gathered or loaded last if no name is given.

        Raises:
            CheckpointStateError: it was not gathered.
        """
        return self._gathered.get(name).replicas[0]

    def abort(self, reason: str) -> bool:
        """Gives up the update that is running, from another thread; returns whether there was one."""
        return self._updates.abort(reason)

    def release_staging(self) -> int:
        """Frees what was kept for the next update, and makes the engine's worker unmap it; returns bytes freed.

        Raises:
            CheckpointStateError: an update is using it.
        """
        return self._updates.release_staging()

    def close(self) -> None:
        """Leaves the group of ranks and frees all memory."""
        self._updates.end_staging()
        self._membership.leave()
        self._updates.close()
        self._sharing.close()
        self._store.close()
        self._events.close()

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
        device_index: int | None = None,
    ) -> None:
        """Connects the ranks, in a group of their own; does nothing if they are connected.

        Update scripts in the wild, SGLang's own among them, call `torch.distributed.barrier()` next, as upstream gives
        torch its default group here. So this call does too, over Gloo, but only in a process that torchrun started as
        this very rank and that has no default group. The price: such a process cannot make a default group of its own
        afterwards. Make it before; or do not call this: `gather_metas` and `update` connect the ranks by themselves,
        and lend torch a group under torchrun until the next update is over. `close` takes it back.

        Args:
            master_addr: Host of rank 0; what the constructor got if None.
            master_port: A free port there; what the constructor got if None.
            timeout: For the ranks to come.
            device_index: Of this rank's GPU, as older callers say it; it was chosen when this was made.

        Raises:
            SettingError: no address is known, or the device is another.
            AddressInUseError: the port on rank 0 is taken.
            DeadlineError: not all ranks came in time.
        """
        here = self._device.torch_device
        if device_index is not None and here.type != "cpu" and device_index != here.index:
            raise SettingError(
                f"device_index={device_index}, but rank {self._rank} uses {here}: its rank modulo gpu_count; choose "
                "others by CUDA_VISIBLE_DEVICES"
            )
        if self._membership.connect(master_addr, master_port, timeout):
            self._membership.export_default_group(timeout)

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Waits until all ranks are here; no collective library is involved.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
        """
        self._membership.group.gather("barrier", b"", timeout, "all ranks being here")

    def gather_metas(self, checkpoint_name: str, *, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Tells all ranks what each of them holds of a checkpoint; ranks that hold nothing take part too.

        With `CHECKPOINT_ENGINE_P2P=1`, whoever gets the metas afterwards can read the memory, see `load_metas`.

        Raises:
            DuplicateTensorError: two ranks hold the same tensor with other bytes, or overlapping shards of it.
            CheckpointFormatError: elements of a tensor are held by no rank.
            CheckpointStateError: the ranks gather different checkpoints.
            DeadlineError: a rank did not come in time.
        """
        registered = self._store.get(checkpoint_name) if checkpoint_name in self._store.names() else None
        shared = self._sharing.settings.share and registered is not None
        mine = self._sharing.describe(registered, share=shared, sample=shared)
        parts = self._membership.group.gather(
            "metas",
            msgspec.msgpack.encode((checkpoint_name, mine)),
            timeout,
            f"all ranks gathering {checkpoint_name!r}",
        )
        holdings: list[Holding] = []
        for part in parts:
            other, holding = msgspec.msgpack.decode(part, type=tuple[str, Holding])
            if other != checkpoint_name:
                raise CheckpointStateError(
                    f"rank {holding.rank} gathers {other!r} while this rank gathers {checkpoint_name!r}"
                )
            holdings.append(holding)
        if not any(holding.segments for holding in holdings):
            # Ranks that are about to load the metas of others gather first, too.
            _log.warning(
                "no rank has registered %r; an update to it needs register_checkpoint, or load_metas", checkpoint_name
            )
            return
        catalog = Catalog(checkpoint_name, tuple(holdings)).validate()
        self._compare_copies(catalog, registered, timeout)
        self._gathered.note(checkpoint_name, [catalog], parts, remote=False)

    def update(
        self,
        checkpoint_name: str,
        req_func: RequestFunction,
        *,
        timeout: timedelta = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        version: str | None = None,
        trace: bool = False,
        reload: WireMode = "auto",
        keep: bool = False,
        method: str = Method.BROADCAST,
        workers: int = 1,
        rollback: bool = True,
        only: Sequence[str] = (),
    ) -> None:
        """Brings a checkpoint to the engine workers of all ranks, or of some, and returns once they have it.

        What was gathered reaches all ranks by broadcast. With `ranks`, only the engines of those are updated, and they
        read the others' host memory; the others take part in the call, undisturbed, and keep their memory as it is
        until it returns. What was loaded with `load_metas` is read from the hosts that hold it.

        Args:
            checkpoint_name: A checkpoint that was gathered or loaded.
            req_func: Called on every rank with (device identity, handle) of all ranks; asks the engines to update.
            timeout: For the whole update.
            ranks: Whose engines are updated; all if None or empty.
            version: What the engines shall call it; the checkpoint's name if None.
            trace: Whether `last_report` shall say when each bucket was copied, broadcast and loaded.
            reload: How the engines take the tensors over: by reload plan as far as it reaches (`auto`), by nothing
                else (`plan`), or by their own loaders (`loader`). `verify` is what the method `verify` does.
            keep: Whether what is read from other parameter servers stays in host memory, registered under its name, so
                that these ranks can serve it in turn.
            method: How bytes get from these ranks to the workers: by `broadcast`; `direct`, where each worker copies
                its own slices out of the host memory of all ranks of its host; or `auto`, direct where possible.
            workers: How many engine workers each rank feeds. In a direct update one rank can feed all workers of its
                host, and needs no GPU (`device="cpu"`): rank r feeds the engine's workers `r * workers` and following.
            rollback: Whether engines that are left with a mixture get back what the last update from here to the same
                ranks brought them, if its checkpoint is still registered as it was, in host memory. The `req_func` of
                that update is called again, and `timeout` counts anew. The error says what came of it.
            only: Patterns, as of a shell, of tensors' names: no others are brought, and what they do not fill keeps
                its bits. A layer comes whole or not at all, as far as its engine fuses or processes it; what an engine
                cannot take by itself is refused before anything changes. `["*"]` says of a checkpoint that all of it
                is such a part.

        Raises:
            CheckpointStateError: not gathered, or another update is running.
            SettingError: a pattern of `only` fits no tensor.
            UpdateError: it did not complete; the message names the rank, the phase and the cause.
        """
        known = self._gathered.get(checkpoint_name, only)
        self._updates.run(
            UpdateOrder(
                checkpoint_name,
                known.replicas,
                known.digest,
                known.remote,
                self._world_size,
                tuple(sorted(set(ranks or range(self._world_size)))),
                version or checkpoint_name,
                req_func,
                timeout,
                trace=trace,
                operation=operation_of(reload),
                reload=mode_of(reload),
                method=Method.of(method),
                keep=keep,
                workers=workers,
                partial=bool(only),
                rollback=rollback,
                checksum=self._settings.checksum,
            )
        )

    def publish(
        self,
        named_tensors: NamedTensors,
        req_func: RequestFunction,
        *,
        version: str,
        files: Files = (),
        name: str = "published",
        in_place: bool = True,
        timeout: timedelta = timedelta(minutes=10),
        method: str = Method.AUTO,
        reload: ReloadMode = "auto",
        rollback: bool = False,
        workers: int = 1,
        trace: bool = False,
        only: Sequence[str] = (),
    ) -> None:
        """One step of a training loop: brings tensors as they are now to the engine workers of all ranks.

        All ranks call it together, each with the tensors that it has. What is alike in successive steps is done once:
        the same tensors again, or others of the same names, shapes and dtypes, are not gathered anew, and workers go
        on with what they have mapped and planned. What is copied or read is sent while the rest still comes.

        Args:
            named_tensors: On the device or the CPU; whole, or what this rank has of them, as in `register_checkpoint`.
            req_func: As in `update`.
            version: What the engines shall call this step's weights.
            files: safetensors files beside tensors or instead of them, as in `register_checkpoint`.
            name: What to call the checkpoint on these ranks; loops that publish different models use different names.
            in_place: Leave tensors where they are, as far as workers can map them there. They must stay as they are
                until this returns. Otherwise, or where they cannot, they are copied to pooled host memory first.
            timeout: For the update.
            method: As in `update`.
            reload: As in `update`.
            rollback: Keep the last step that succeeded in host memory, beside this one's: should a step leave engines
                with a mixture, they get it back. Takes that memory twice, and no tensor is left in place for it;
                files in shared memory are, and must stay as they are for it.
            workers: As in `update`.
            trace: As in `update`.
            only: As in `update`; `["*"]` where these tensors are a part of the model, and all of that comes.

        Raises:
            CheckpointEngineError: as `register_checkpoint`, `gather_metas` and `update`.
        """
        loop, in_place = name, in_place and not rollback
        if rollback and self._steps_of(loop, timeout) % 2:
            name = f"{loop}, the other step"
        with self.refreshed(name, named_tensors, files=files, in_place=in_place) as gather:
            gather(timeout)
            self.update(
                name,
                req_func,
                timeout=timeout,
                version=version,
                method=method,
                reload=reload,
                rollback=rollback,
                workers=workers,
                trace=trace,
                only=only,
            )
            self._steps[loop] = self._steps.get(loop, 0) + 1

    @contextlib.contextmanager
    def refreshed(
        self,
        name: str,
        named_tensors: NamedTensors | None = None,
        *,
        files: Files = (),
        in_place: bool = False,
        opener: Opener = os.open,
    ) -> Generator[Callable[[timedelta], None]]:
        """For an update within it: `publish` in parts. Gives what gathers, if that has to be done anew on any rank.

        What had this name before is replaced. Of the same names, shapes and dtypes in host memory the new bytes may
        still be on their way, at the latest until this ends.

        Args:
            name: Under which it is registered, and is to be updated.
            named_tensors: As in `publish`.
            files: As in `publish`.
            in_place: As in `publish`.
            opener: How files are opened, as in `register_checkpoint`.

        Raises:
            CheckpointEngineError: as `register_checkpoint`; what gathers raises as `gather_metas`.
        """
        changed = self._refresh(name, named_tensors or {}, files, in_place, opener)

        def gather(timeout: timedelta) -> None:
            if self._anywhere(changed or not self._gathered.has(name), timeout):
                self.gather_metas(name, timeout=timeout)
            else:  # the same places, with other bytes
                self._compare_copies(self.catalog(name), self._store.get(name), timeout)

        try:
            yield gather
        finally:
            self._store.settle(name)

    def _refresh(self, name: str, tensors: NamedTensors, files: Files, in_place: bool, opener: Opener) -> bool:  # noqa: FBT001
        """Whether others need to hear of it: of other places, or of other bytes where they are told what those are."""
        if files and self._settings.checksum:
            if name in self._store.names():
                self.unregister_checkpoint(name)
            self.register_checkpoint(
                name, files=files, named_tensors=tensors, in_place=in_place, use_shared_memory_pool=True, opener=opener
            )
            return True
        share = self._sharing.settings.share
        changed = self._store.refresh(
            name,
            tensors,
            files=files,
            opener=opener,
            tensors_stay=in_place,
            at_once=not share,
            farewell=self._part_with,
        )
        return changed or share

    def _steps_of(self, loop: str, timeout: timedelta) -> int:
        """How many steps of a loop have succeeded; a rank to which the last one failed late hears of it here."""
        mine = msgspec.msgpack.encode(self._steps.get(loop, 0))
        parts = self._membership.group.gather("steps", mine, timeout, "all ranks publishing")
        self._steps[loop] = max(msgspec.msgpack.decode(part, type=int) for part in parts)
        return self._steps[loop]

    def _compare_copies(self, catalog: Catalog, registered: Registered | None, timeout: timedelta) -> None:
        """Has all ranks compare what several of them hold; does nothing where that is nothing."""
        if not self._copies.copied(catalog):
            return
        mine = msgspec.msgpack.encode(self._copies.sums_of(catalog, registered, Deadline(timeout.total_seconds())))
        sums = self._membership.group.gather("copies", mine, timeout, "all ranks comparing what several of them hold")
        self._copies.compare(catalog, [msgspec.msgpack.decode(part, type=list[int]) for part in sums])

    def _part_with(self, name: str, *, stays: bool) -> None:
        """A checkpoint goes; its memory goes too, or stays for the next. Workers unmap what goes before it does."""
        self._sharing.withdraw(name)
        if not stays:
            self._updates.take_back_staging()

    def _anywhere(self, here: bool, timeout: timedelta) -> bool:  # noqa: FBT001
        """Whether this is so on any rank."""
        if self._world_size == 1:
            return here
        answers = self._membership.group.gather("changed", b"1" if here else b"", timeout, "all ranks publishing")
        return any(answers)

    def verify(
        self,
        checkpoint_name: str,
        req_func: RequestFunction,
        *,
        timeout: timedelta = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        method: str = Method.BROADCAST,
        workers: int = 1,
        only: Sequence[str] = (),
    ) -> ComparisonFigures:
        """Compares what the engine workers hold with a checkpoint, or a part of it, bit by bit; nothing changes.

        The checkpoint travels as in an update, and `req_func` asks the engines to verify; see there for all arguments.
        Returns what this rank's worker found.

        Raises:
            CheckpointStateError: not gathered, or an update is running.
            UpdateError: it did not complete, or an engine cannot compare.
        """
        self.update(
            checkpoint_name,
            req_func,
            timeout=timeout,
            ranks=ranks,
            reload="verify",
            method=method,
            workers=workers,
            only=only,
        )
        return ComparisonFigures.from_details(self.last_report.engine if self.last_report else {})

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


def _device_index(rank: int, gpu_count: int | None) -> int:
    there = accelerator_count()
    if gpu_count and there and gpu_count > there:
        raise SettingError(f"gpu_count is {gpu_count}, but this host has {there}: leave it out")
    count = gpu_count or there
    return rank % count if count else 0
