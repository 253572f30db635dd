"""One rank's part in transfers between hosts. Nothing listens and nothing is registered before it is needed."""

from __future__ import annotations

import logging
import socket
import threading

import msgspec

from checkpoint_engine.catalog import Holding
from checkpoint_engine.device import Device
from checkpoint_engine.device_utils import get_ip
from checkpoint_engine.p2p.open import open_p2p_store
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.settings import P2PSettings
from checkpoint_engine.source.content import content_of
from checkpoint_engine.source.file_watch import SETTLING, FileWatch
from checkpoint_engine.source.store import Registered

__all__ = ["Sharing"]

_log = logging.getLogger(__name__)


class Sharing:
    """Opens the P2P store of this rank, and says how its memory is reached."""

    def __init__(self, rank: int, device: Device, gpu: int, gpus_seen: int) -> None:
        """Reads the settings; opens the store at once if checkpoints shall be shared.

        Args:
            rank: This rank.
            device: Its device.
            gpu: Place of its GPU among those that this process sees.
            gpus_seen: How many it sees.

        Raises:
            SettingError: an environment variable cannot work.
            MissingDependencyError: checkpoints shall be shared, and Mooncake is not installed.
        """
        self.settings = P2PSettings.from_environment()
        self._rank = rank
        self._device = device
        self._gpu = (gpu, gpus_seen)
        self._lock = threading.Lock()
        self._store: P2PStore | None = None
        self._files = FileWatch(self._give_up)
        self._reminded = False
        if self.settings.share:
            self.store()

    def store(self) -> P2PStore:
        """The store, listening from now on.

        Raises:
            MissingDependencyError: Mooncake is not installed.
            SettingError: the transport cannot be used here.
            HostMemoryError: the memlock limit is too low.
        """
        with self._lock:
            if self._store is None:
                self._store = open_p2p_store(self.settings, get_ip(), *self._gpu)
            return self._store

    def describe(self, registered: Registered | None, *, share: bool, sample: bool = False) -> Holding:
        """What this rank holds of a checkpoint; with `share` how others read it, with `sample` what its bytes are.

        Raises:
            MissingDependencyError: it shall be shared, and Mooncake is not installed.
            HostMemoryError: the memory cannot be registered.
        """
        entries = tuple(registered.entries) if registered else ()
        if not share:
            return Holding(self._rank, socket.gethostname(), self._device.identity, entries)
        store = self.store()
        lease = store.share(registered.name, registered.host_segments) if registered else None
        if registered:
            self._files.add(registered.name, registered.files_in_place)
        published = tuple(
            msgspec.structs.replace(entry, address=address)
            for entry, address in zip(entries, lease.segments if lease else (), strict=True)
        )
        return Holding(
            self._rank,
            socket.gethostname(),
            self._device.identity,
            published,
            p2p_address=store.address,
            rdma_device=store.nic,
            transport=store.transport,
            control_address=lease.control_address if lease else 0,
            generation=lease.generation if lease else 0,
            content=content_of(registered.host_segments, entries) if registered and sample else "",
            settling=SETTLING if registered and registered.files_in_place else 0.0,
        )

    def remind(self) -> None:
        """Says, the first time that metas are given out, if nobody elsewhere can read what they describe."""
        if not (self.settings.share or self._reminded):
            self._reminded = True
            _log.warning(
                "these metas are of use within this job only: no rank shares its memory; for others to join from it, "
                "start all ranks with CHECKPOINT_ENGINE_P2P=1"
            )

    def withdraw(self, name: str) -> None:
        """Others refuse from now on what they read of this checkpoint."""
        self._files.remove(name)
        self._give_up(name)

    def _give_up(self, name: str) -> None:
        if self._store is not None:
            self._store.withdraw(name)

    def close(self) -> None:
        """Withdraws everything."""
        self._files.close()
        if self._store is not None:
            self._store.close()
            self._store = None
