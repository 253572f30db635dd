"""Takes a checkpoint out of running parameter servers' memory, tensor by tensor: for an engine that starts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.deadline import Cancel
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.device_utils import get_ip
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import DeadlineError
from checkpoint_engine.host.p2p_open import open_p2p_store
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.planning.peers import plan_peer_reads
from checkpoint_engine.planning.receivers import Port
from checkpoint_engine.settings import P2PSettings, Settings
from checkpoint_engine.transfer.feeds import peers_of
from checkpoint_engine.transfer.fetching import PeerSource


def pull_tensors(
    replicas: Sequence[Catalog], *, rank: int = 0, ranks: int = 1, timeout: float = 600.0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, on the CPU, in memory of its own; the reads run ahead of the caller.

    Args:
        replicas: Who holds it; one takes over where another fails.
        rank: Which GPU of those that this process sees is meant; it decides on the network card.
        ranks: How many processes of this host pull at the same time.
        timeout: Seconds until the last tensor.

    Raises:
        PeerError: a tensor cannot be read from any holder, or a holder has moved on to another version.
        CheckpointStateError: the catalogs are not of the same checkpoint.
        MissingDependencyError: Mooncake is not installed.
        DeadlineError: the time is over.
    """
    cancel = Cancel()
    store = open_p2p_store(P2PSettings.from_environment(), get_ip(), rank, ranks)
    # A single receiver: how it is connected makes no difference.
    plan = plan_peer_reads(replicas, Settings.from_environment().bucket_size, [Port("this process")])
    expired = threading.Timer(timeout, cancel.set, [DeadlineError(f"the checkpoint did not come within {timeout:g} s")])
    expired.daemon = True
    expired.start()
    with contextlib.closing(
        PeerSource(
            plan,
            0,
            peers=peers_of(plan),
            local=lambda _bucket, _route: None,
            store=store,
            device=CpuDevice(rank),
            cancel=cancel,
            keep=False,
        )
    ) as source:
        try:
            for index, bucket in enumerate(plan.plan.buckets):
                cancel.check()
                yield from _tensors_of(bucket, source.read(index))
                source.release(index)
        finally:
            expired.cancel()


def _tensors_of(bucket: Bucket, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in bucket.tensors:
        start = tensor.offset - bucket.start
        # A copy: whoever loads may keep a tensor, and the bucket's memory is used again.
        piece = memory[start : start + tensor.nbytes].clone()
        yield tensor.name, piece.view(torch_dtype(tensor.dtype)).view(tensor.shape)
