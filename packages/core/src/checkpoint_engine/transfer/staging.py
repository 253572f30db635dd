"""Staging memory between updates: freed after each, or kept for the next with the worker's mapping of it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import CpuDevice, Device, ExportedMemory, Staging
from checkpoint_engine.device.memory import Memory
from checkpoint_engine.errors import DeviceMemoryError
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.lease import MappingLease
from checkpoint_engine.planning.buckets import BucketPlan
from checkpoint_engine.planning.staging import StagingLayout, choose_layout

__all__ = ["StagingCache", "choose_staging"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Allocated:
    """Staging memory, and the identity of its device."""

    device: str
    staging: Staging

    @property
    def memory(self) -> Memory:
        return self.staging.memory


class StagingCache:
    """Gives out staging memory, one at a time; what is kept is used again if it is large enough."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._allocated: _Allocated | None = None
        self._exported: ExportedMemory | None = None
        self._leases: list[MappingLease] = []

    @property
    def kept(self) -> int:
        """Bytes that outlive the update that uses them."""
        return self._allocated.memory.nbytes if self._keep and self._allocated is not None else 0

    def held(self, device: Device) -> int:
        """Bytes allocated on a device."""
        ours = self._allocated is not None and self._allocated.device == device.identity
        return self._allocated.memory.nbytes if ours and self._allocated is not None else 0

    @contextmanager
    def for_one_update(self) -> Generator[None]:
        """Within it, staging can be taken, or memory exported.

        Nothing is kept after a failure: who knows what the worker has mapped. What was exported stays with the worker
        in any case: it costs the device nothing, and registering it anew would cost the next update seconds.
        """
        done = False
        try:
            yield
            done = True
        finally:
            if done:
                self.free_unless_kept()
            else:
                self.release()

    def free_unless_kept(self) -> None:
        """Frees what is for one update only; the worker has unmapped it."""
        if not self._keep and self._exported is None:
            self.release()

    def export(self, memory: ExportedMemory) -> None:
        """Uses memory that is not staging in its place; the worker keeps its mapping if that is of the same memory."""
        if self._exported is not None and self._exported.memory == memory.memory:
            self._exported.close()
        else:
            self.release()
        self._exported = memory

    def take(self, device: Device, nbytes: int) -> Staging:
        """Staging of at least `nbytes`.

        Raises:
            DeviceMemoryError: there is not enough.
        """
        if self._allocated is None or self._exported is not None or self.held(device) < nbytes:
            self.release()  # first, so that old and new need not fit side by side
            self._allocated = self._allocate(device, nbytes)
        return self._allocated.staging

    def take_back(self) -> None:
        """Makes the worker unmap exported memory, which would otherwise outlive the checkpoint that lay in it."""
        if self._exported is not None:
            self.release()

    def leave_with_workers(self, channels: Sequence[SenderChannel]) -> None:
        """After an update: the workers keep their mappings until this side of the channels ends."""
        if self._keep or self._exported is not None:
            self._end_leases()  # of others, perhaps; these have none from before any more
            self._leases = [MappingLease(channel.duplicate()) for channel in channels]

    def release(self) -> None:
        """Makes the worker unmap what is kept, and frees it."""
        self._end_leases()
        if self._allocated is not None:
            allocated, self._allocated = self._allocated, None
            allocated.staging.close()
        if self._exported is not None:
            exported, self._exported = self._exported, None
            exported.close()

    def _allocate(self, device: Device, nbytes: int) -> _Allocated:
        staging = device.allocate(nbytes)
        if self._keep:
            # The driver gives out the same IPC handle for the next allocation at the same address: that is no name.
            staging.memory = msgspec.structs.replace(staging.memory, lease=secrets.token_hex(16))
        return _Allocated(device.identity, staging)

    def _end_leases(self) -> None:
        """Memory that another process has mapped must not be freed."""
        leases, self._leases = self._leases, []
        mapped = sum(each.memory.nbytes for each in (self._exported, self._allocated) if each is not None)
        deadline = Deadline(limits.UNMAP + min(mapped / limits.UNMAP_BYTES, limits.UNMAP_AT_MOST))
        ended = [lease.end(deadline) for lease in leases]
        if not all(ended):
            logger.warning(
                "an engine's worker has not unmapped the memory that this rank shares with it within %s; the device "
                "may not get it back before that worker goes on or ends",
                deadline.said,
            )


def choose_staging(
    plan: BucketPlan, receivers: int, device: Device, available: int, rank: int
) -> tuple[Device, StagingLayout]:
    """Where staging goes and how it is laid out: on the device, or on the host where that is too full.

    All ranks decide alike, since `available` is the smallest free memory of all their devices, in bytes.

    Raises:
        DeviceMemoryError: not even the host has room for the largest bucket.
    """
    layout = choose_layout(plan, receivers, available)
    if layout is not None:
        return device, layout
    host = CpuDevice(rank)
    free, _ = host.memory()
    layout = choose_layout(plan, receivers, free)
    if layout is None:
        raise DeviceMemoryError(
            f"the largest bucket has {plan.largest} bytes; {available} bytes may be used on the device, and "
            f"{free} are free on the host: lower the engine's memory share, or raise PS_MEM_FRACTION"
        )
    logger.warning(
        "only %d bytes of device memory may be used and the largest bucket has %d: staging in host memory, which is "
        "slower",
        available,
        plan.largest,
    )
    return host, layout
