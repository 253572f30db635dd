"""The staging memory that this worker keeps mapped between updates: at most one for each device.

A mapping is used again only for the very allocation that it was made of, which has a name of its own; it is dropped
when another one comes, when the parameter server says so, or when that is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from checkpoint_engine.device import Device, Mapped
from checkpoint_engine.device.base import Memory
from checkpoint_engine.link.channel import ReceiverChannel
from checkpoint_engine.link.lease import Lease


class _Kept:
    """A mapping, kept until its lease ends or it is taken."""

    def __init__(self, device: Device, memory: Memory, mapped: Mapped, lease: Lease) -> None:
        self.memory = memory
        self.mapped = mapped
        self.lease = lease
        self._device = device

    def unmap(self) -> None:
        with self._device.active():
            self.mapped.close()


_kept: dict[str, _Kept] = {}
_lock = threading.Lock()


@contextmanager
def mapped_staging(device: Device, memory: Memory, channel: ReceiverChannel) -> Generator[Mapped]:
    """The parameter server's staging memory, for one update; the engine may have no work left that reads it.

    Raises:
        LinkError: it cannot be mapped here.
    """
    mapped = _take(device, memory) or device.map(memory, channel.take_descriptors())
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
        _keep(device, memory, mapped, Lease(channel.duplicate()))
    else:
        mapped.close()


def kept_bytes(device: Device) -> int:
    """Bytes of staging memory that are mapped now although no update runs."""
    with _lock:
        kept = _kept.get(device.identity)
    return 0 if kept is None else kept.memory.nbytes


def _take(device: Device, memory: Memory) -> Mapped | None:
    """What is kept for this device, if it is that memory; anything else is dropped."""
    with _lock:
        kept = _kept.pop(device.identity, None)
    if kept is None:
        return None
    same = bool(memory.lease) and kept.memory == memory
    if not same:
        kept.unmap()
    kept.lease.cancel()  # by now the thread that watches it has nothing to do
    return kept.mapped if same else None


def _keep(device: Device, memory: Memory, mapped: Mapped, lease: Lease) -> None:
    kept = _Kept(device, memory, mapped, lease)
    with _lock:
        _kept[device.identity] = kept
    threading.Thread(target=_watch, args=(device.identity, kept), name="checkpoint-engine-lease", daemon=True).start()


def _watch(identity: str, kept: _Kept) -> None:
    kept.lease.wait()
    with _lock:
        ours = _kept.get(identity) is kept
        if ours:
            del _kept[identity]
    try:
        if ours:
            kept.unmap()
    finally:
        kept.lease.close()
