"""Host memory of the parameter server's ranks, mapped in an engine's worker, which copies out of it by itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device.base import Device
from checkpoint_engine.device.host_memory import map_host_memory
from checkpoint_engine.device.registering import Registration
from checkpoint_engine.errors import LinkError
from checkpoint_engine.link.messages import HostMemory, SharedSegments


class MappedSegments:
    """Segments in the order in which they were lent; each is registered with the device before it is given out."""

    def __init__(self, device: Device, tensors: Sequence[torch.Tensor]) -> None:
        """Begins to register them, in the background."""
        self._tensors = tuple(tensors)
        self._registration = Registration(device, self._tensors)

    @property
    def tensor(self) -> torch.Tensor:
        """The first of them, which may not be registered yet."""
        return self._tensors[0] if self._tensors else torch.empty(0, dtype=torch.uint8, device="cpu")

    def part(self, number: int, deadline: Deadline) -> torch.Tensor:
        """One segment; waits until the device copies out of it at full speed.

        Raises:
            LinkError: there is none of that number.
            HostMemoryError: the driver refuses to register it.
            DeadlineError: it was not registered in time.
        """
        if not 0 <= number < len(self._tensors):
            raise LinkError(f"a bucket lies in segment {number}, and {len(self._tensors)} are mapped")
        self._registration.wait(number, deadline)
        return self._tensors[number]

    def close(self) -> None:
        """Unregisters and unmaps them; a mapping lives as long as a view of it."""
        self._tensors = ()
        self._registration.close()


def map_segments(device: Device, memory: SharedSegments, descriptors: tuple[int, ...]) -> MappedSegments:
    """Maps lent segments, begins to register them with the device, and closes the descriptors.

    Raises:
        LinkError: a descriptor is missing, or what it stands for could shrink or is too small.
    """
    left = list(descriptors)
    try:
        if len(left) != len(memory.sizes):
            raise LinkError(f"{len(memory.sizes)} segments were announced, {len(left)} file descriptors came")
        return MappedSegments(
            device, [map_host_memory(HostMemory(size), (left.pop(0),)).tensor for size in memory.sizes]
        )
    finally:
        for descriptor in left:
            os.close(descriptor)
