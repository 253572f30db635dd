"""Host memory of the parameter server's ranks, mapped in an engine's worker, which copies out of it by itself."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Protocol

import torch

from checkpoint_engine.device.base import Pinned
from checkpoint_engine.device.host_memory import map_host_memory
from checkpoint_engine.errors import LinkError
from checkpoint_engine.link.messages import HostMemory, SharedSegments


class _Pins(Protocol):
    def pin(self, buffer: torch.Tensor) -> Pinned: ...


class MappedSegments:
    """Segments in the order in which they were lent; registered with the device, so that it copies at full speed."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], resources: ExitStack) -> None:
        self.tensors = tensors
        self._resources = resources

    @property
    def tensor(self) -> torch.Tensor:
        """The first of them."""
        return self.tensors[0] if self.tensors else torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Unregisters and unmaps them; a mapping lives as long as a view of it."""
        self.tensors = ()
        self._resources.close()


def map_segments(device: _Pins, memory: SharedSegments, descriptors: tuple[int, ...]) -> MappedSegments:
    """Maps lent segments and registers them with the device; closes the descriptors.

    Raises:
        LinkError: a descriptor is missing, or what it stands for could shrink or is too small.
        HostMemoryError: the driver refuses to register one.
    """
    if len(descriptors) != len(memory.sizes):
        for descriptor in descriptors:
            os.close(descriptor)
        raise LinkError(f"{len(memory.sizes)} segments were announced, {len(descriptors)} file descriptors came")
    left = list(descriptors)
    tensors: list[torch.Tensor] = []
    with ExitStack() as resources:
        try:
            for size in memory.sizes:
                tensors.append(map_host_memory(HostMemory(size), (left.pop(0),)).tensor)
                resources.callback(device.pin(tensors[-1]).close)
        finally:
            for descriptor in left:
                os.close(descriptor)
        return MappedSegments(tuple(tensors), resources.pop_all())
