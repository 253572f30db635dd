"""The staging memory that a worker keeps mapped between updates: at most one mapping for each device.

A mapping is used again only for the very allocation that it was made of, which has a name of its own; it is dropped
when another one comes, when the parameter server says so, or when that is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from checkpoint_engine.device import Device, Mapped
from checkpoint_engine.device.memory import Memory
from checkpoint_engine.link.channel import ReceiverChannel
from checkpoint_engine.link.lease import MappingLease

__all__ = ["MappingCache"]


class _CachedMapping:
    """A mapping that is there until its lease ends or it is taken."""

    def __init__(self, device: Device, memory: Memory, mapped: Mapped, lease: MappingLease) -> None:
        self.memory = memory
        self.mapped: Mapped | None = mapped
        self.lease = lease
        self._device = device

    def unmap(self) -> None:
        """Forgets the mapping too: whatever was delivered out of it goes now, before the lease says that it has."""
        mapped, self.mapped = self.mapped, None
        with self._device.active():
            if mapped is not None:
                mapped.close()


class MappingCache:
    """Mappings by the identity of their device; any number of threads may use it."""

    def __init__(self) -> None:
        self._mappings: dict[str, _CachedMapping] = {}
        self._lock = threading.Lock()

    @contextmanager
    def mapped_staging(self, device: Device, memory: Memory, channel: ReceiverChannel) -> Generator[Mapped]:
        """The parameter server's staging memory, for one update; the engine may have no work left that reads it.

        Raises:
            LinkError: it cannot be mapped here.
        """
        mapped = self._take(device, memory) or device.map(memory, channel.take_descriptors())
        try:
            try:
                yield mapped
            finally:
                # The engine may still be reading; the memory may go only after that.
                device.synchronize()
        except BaseException:
            mapped.close()
            raise
        if memory.lease:
            self._put(device, memory, mapped, MappingLease(channel.duplicate()))
        else:
            mapped.close()

    def nbytes(self, device: Device) -> int:
        """Bytes of staging memory that are mapped now although no update runs."""
        with self._lock:
            cached = self._mappings.get(device.identity)
        return 0 if cached is None else cached.memory.nbytes

    def _take(self, device: Device, memory: Memory) -> Mapped | None:
        """What is mapped for this device, if it is that memory; anything else is dropped."""
        with self._lock:
            cached = self._mappings.pop(device.identity, None)
        if cached is None:
            return None
        same = bool(memory.lease) and cached.memory == memory
        if not same:
            cached.unmap()
        cached.lease.cancel()  # by now the thread that watches it has nothing to do
        return cached.mapped if same else None

    def _put(self, device: Device, memory: Memory, mapped: Mapped, lease: MappingLease) -> None:
        cached = _CachedMapping(device, memory, mapped, lease)
        with self._lock:
            self._mappings[device.identity] = cached
        watch = threading.Thread(
            target=self._watch, args=(device.identity, cached), name="checkpoint-engine-lease", daemon=True
        )
        watch.start()

    def _watch(self, identity: str, cached: _CachedMapping) -> None:
        cached.lease.wait()
        with self._lock:
            ours = self._mappings.get(identity) is cached
            if ours:
                del self._mappings[identity]
        try:
            if ours:
                cached.unmap()
        finally:
            cached.lease.close()
