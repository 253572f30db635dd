"""Takes a checkpoint out of running parameter servers' memory, tensor by tensor: for an engine that starts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.device_utils import get_ip
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import CheckpointStateError, DeadlineError
from checkpoint_engine.p2p.open import open_p2p_store
from checkpoint_engine.p2p.store import P2PStore
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.planning.peers import plan_peer_reads
from checkpoint_engine.planning.receivers import Port
from checkpoint_engine.settings import P2PSettings, Settings
from checkpoint_engine.transfer.fetching import PeerSource
from checkpoint_engine.transfer.peers import peers_of

__all__ = ["Pull", "PullingGroup"]


class PullingGroup(Protocol):
    """Processes that need the same checkpoint: each reads a share of it, and they hand it to each other."""

    @property
    def rank(self) -> int:
        """Place of this process among them."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where what is handed on must lie, and where tensors will."""
        ...

    def hand_on(self, memory: torch.Tensor, source: int) -> None:
        """Fills `memory` with that of process `source`; all call it in the same order."""
        ...


class _Alone:
    """A group of one."""

    rank = 0
    size = 1
    device = torch.device("cpu")

    def hand_on(self, memory: torch.Tensor, source: int) -> None:
        """Nobody else needs it."""


class Pull:
    """One process's part in pulling a checkpoint."""

    def __init__(
        self,
        replicas: Sequence[Catalog],
        *,
        rank: int = 0,
        ranks: int = 1,
        timeout: float = 600.0,
        group: PullingGroup | None = None,
    ) -> None:
        """Plans; nothing is read yet.

        Args:
            replicas: Who holds it, the same for the whole group; one takes over where another fails.
            rank: Which GPU of those that this process sees is meant; it decides on the network card.
            ranks: How many GPUs this process sees.
            timeout: Seconds until the last tensor.
            group: With whom this process shares the reading.

        Raises:
            CheckpointStateError: the catalogs are not of the same checkpoint, or hold a tensor in shards.
        """
        cut = next((tensor for catalog in replicas for tensor in catalog.tensors() if tensor.shard is not None), None)
        if cut is not None:
            raise CheckpointStateError(
                f"tensor {cut.name!r} is held in shards, and an engine starts from whole tensors only: start it with "
                "dummy weights and update it (join), or have the seeds register whole tensors"
            )
        self._group = group or _Alone()
        self._place = rank, ranks
        self._timeout = timeout
        # How the others are connected is not known here: they share alike.
        ports = [Port(f"process {number}") for number in range(self._group.size)]
        self._plan = plan_peer_reads(replicas, Settings.from_environment().bucket_size, ports)

    @property
    def nbytes(self) -> int:
        """What this process reads itself."""
        return sum(bucket.nbytes for bucket in self._plan.plan.buckets if bucket.owner == self._group.rank)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, in memory that is not used again; the reads run ahead of the caller.

        Raises:
            PeerError: a tensor cannot be read from any holder, or a holder has moved on to another version.
            MissingDependencyError: Mooncake is not installed.
            DeadlineError: the time is over.
        """
        cancel = Cancel()
        late = DeadlineError(f"the checkpoint did not come within {self._timeout:g} s")
        expired = threading.Timer(self._timeout, cancel.set, [late])
        expired.daemon = True
        expired.start()
        settings = P2PSettings.from_environment()
        try:
            with (
                contextlib.closing(open_p2p_store(settings, get_ip(), *self._place)) as store,
                contextlib.closing(self._open(store, cancel)) as source,
            ):
                for index, bucket in enumerate(self._plan.plan.buckets):
                    cancel.check()
                    memory = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._group.device)
                    if bucket.owner == self._group.rank:
                        memory.copy_(source.read(index))
                        source.release(index)
                    self._group.hand_on(memory, bucket.owner)
                    yield from _tensors_of(bucket, memory)
        finally:
            expired.cancel()

    def _open(self, store: P2PStore, cancel: Cancel) -> PeerSource:
        return PeerSource(
            self._plan,
            self._group.rank,
            peers=peers_of(self._plan),
            local=lambda _bucket, _route: None,
            store=store,
            device=CpuDevice(self._place[0]),
            cancel=cancel,
            keep=False,
        )


def _tensors_of(bucket: Bucket, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in bucket.tensors:
        start = tensor.offset - bucket.start
        dtype = torch_dtype(tensor.dtype)
        piece = memory[start : start + tensor.nbytes]
        if start % dtype.itemsize:  # a file that was registered in place aligns nothing
            piece = piece.clone()
        yield tensor.name, piece.view(dtype).view(tensor.shape)
