"""Memory of the parameter server's ranks, mapped in an engine's worker, which copies out of it by itself."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device.base import Device
from checkpoint_engine.device.host_memory import map_host_memory
from checkpoint_engine.device.imported_blocks import ImportedBlocks
from checkpoint_engine.device.memory import Allocation, HostMemory, SharedSegments
from checkpoint_engine.device.registering import Registration
from checkpoint_engine.errors import LinkError

__all__ = ["MappedSegments", "Part", "map_segments"]

Part = torch.Tensor | ImportedBlocks
"""A segment: host memory, or device memory in allocations that lie apart."""


class MappedSegments:
    """Segments in order; those of host memory are registered with the device before they are given out."""

    def __init__(self, device: Device, parts: Sequence[Part]) -> None:
        """Begins to register them, in the background."""
        self._parts = tuple(parts)
        self._registration = Registration(device, [_host_memory_of(part) for part in self._parts])

    @property
    def tensor(self) -> torch.Tensor:
        """The first of them, which may not be registered yet."""
        return _host_memory_of(self._parts[0]) if self._parts else _nothing()

    def part(self, number: int, deadline: Deadline) -> Part:
        """One segment; waits until the device copies out of it at full speed.

        Raises:
            LinkError: there is none of that number.
            HostMemoryError: the driver refuses to register it.
            DeadlineError: it was not registered in time.
        """
        if not 0 <= number < len(self._parts):
            raise LinkError(f"a bucket lies in segment {number}, and {len(self._parts)} are mapped")
        self._registration.wait(number, deadline)
        return self._parts[number]

    def close(self) -> None:
        """Unregisters and unmaps them; a mapping of host memory lives as long as a view of it."""
        parts, self._parts = self._parts, ()
        self._registration.close()
        for part in parts:
            if isinstance(part, ImportedBlocks):
                part.close()


def map_segments(device: Device, memory: SharedSegments, descriptors: tuple[int, ...]) -> MappedSegments:
    """Maps segments of other processes, begins to register them with the device, and closes the descriptors.

    Raises:
        LinkError: a descriptor is missing, or what it stands for could shrink or is too small; or the device does not
            reach some of the memory.
    """
    left = deque(descriptors)
    parts: list[Part] = []
    try:
        _check_count(memory, len(left))
        for number, size in enumerate(memory.sizes):
            if number in memory.allocations:
                parts.append(_import(device, memory.allocations[number], left))
            else:
                parts.append(map_host_memory(HostMemory(size), (left.popleft(),)).tensor)
        return MappedSegments(device, parts)
    except BaseException:
        for part in parts:
            if isinstance(part, ImportedBlocks):
                part.close()
        raise
    finally:
        for descriptor in left:
            os.close(descriptor)


def _import(device: Device, allocations: Sequence[Allocation], descriptors: deque[int]) -> ImportedBlocks:
    return ImportedBlocks(
        allocations,
        lambda allocation: device.import_block(allocation, None if allocation.handle else descriptors.popleft()),
    )


def _check_count(memory: SharedSegments, came: int) -> None:
    of_device = [allocation for allocations in memory.allocations.values() for allocation in allocations]
    needed = len(memory.sizes) - len(memory.allocations) + sum(not allocation.handle for allocation in of_device)
    if came != needed:
        raise LinkError(f"{needed} segments were announced, {came} file descriptors came")


def _host_memory_of(part: Part) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else _nothing()


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")
