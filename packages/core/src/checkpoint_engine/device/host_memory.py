"""Shared host memory of another process, mapped here."""

from __future__ import annotations

import fcntl
import os

import torch

from checkpoint_engine.device.memory import HostMemory, Memory
from checkpoint_engine.device.pages import map_shared
from checkpoint_engine.errors import LinkError

__all__ = ["CpuMapped", "map_block", "map_host_memory", "view_of"]


class CpuMapped:
    """Another process's shared memory. It stays mapped as long as a view of it lives, so no view ever dangles."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def close(self) -> None:
        """Lets go of the mapping."""
        self.tensor = torch.empty(0, dtype=torch.uint8)


def map_host_memory(memory: Memory, descriptors: tuple[int, ...]) -> CpuMapped:
    """Maps staging that lies in host memory; closes the descriptors.

    Raises:
        LinkError: it is not host memory, or its descriptor is missing or too small.
    """
    try:
        if not isinstance(memory, HostMemory):
            raise LinkError("the parameter server stages on a GPU, but this engine worker runs on the CPU")
        if len(descriptors) != 1:
            raise LinkError(f"host staging comes with one file descriptor, {len(descriptors)} came")
        if not _cannot_shrink(descriptors[0]):
            raise LinkError("the staging memory is not sealed: its owner could pull it from under this engine worker")
        if not 0 <= memory.nbytes <= os.fstat(descriptors[0]).st_size:
            raise LinkError(f"the staging memory is smaller than the {memory.nbytes} bytes announced")
        return CpuMapped(view_of(descriptors[0], memory.nbytes))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def map_block(descriptor: int, nbytes: int) -> CpuMapped:
    """Maps memory that a trainer allocated and shares; closes the descriptor. Whoever allocated it may yet shrink it.

    Raises:
        LinkError: it is smaller than was said.
    """
    try:
        size = os.fstat(descriptor).st_size
        if size < nbytes:
            raise LinkError(f"a block of a trainer's memory has {size} bytes, {nbytes} were announced")
        return CpuMapped(view_of(descriptor, nbytes))
    finally:
        os.close(descriptor)


def _cannot_shrink(descriptor: int) -> bool:
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # a file of another kind, which knows no seals
        return False


def view_of(descriptor: int, nbytes: int) -> torch.Tensor:
    """1-D uint8 over a mapping of its own, which lives as long as the tensor or a view of it."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(map_shared(descriptor, nbytes), dtype=torch.uint8)
