"""The CPU as a device of its own right: staging is anonymous shared memory, copies are done when they return."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from contextlib import AbstractContextManager

import torch

from checkpoint_engine.device.base import Event, Memory
from checkpoint_engine.device.host_memory import CpuMapped, map_host_memory, view_of
from checkpoint_engine.device.segments import MappedSegments, map_segments
from checkpoint_engine.errors import DeviceMemoryError
from checkpoint_engine.link.messages import HostMemory, SharedSegments


class CpuDevice:
    """Host memory behind the same protocol as a GPU."""

    backend = "gloo"

    def __init__(self, rank: int) -> None:
        self.torch_device = torch.device("cpu")
        self.identity = f"cpu:{rank}"

    def active(self) -> AbstractContextManager[object]:
        """There is only one CPU."""
        return contextlib.nullcontext()

    def pci_address(self) -> None:
        """The CPU is no PCI device."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of host memory."""
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def allocate(self, nbytes: int) -> CpuStaging:
        """Allocates shared memory.

        Raises:
            DeviceMemoryError: the kernel refuses.
        """
        return CpuStaging(nbytes)

    def map(self, memory: Memory, descriptors: tuple[int, ...]) -> CpuMapped | MappedSegments:
        """Maps shared memory of another process; takes over the descriptors.

        Raises:
            LinkError: it is not host memory, or a descriptor is missing or too small.
        """
        if isinstance(memory, SharedSegments):
            return map_segments(self, memory, descriptors)
        return map_host_memory(memory, descriptors)

    def pin(self, buffer: torch.Tensor) -> CpuPinned:
        """Nothing to do: the CPU copies from any memory at full speed."""
        del buffer
        return CpuPinned()

    def stream(self) -> CpuStream:
        """A stream whose work is done when the call returns."""
        return CpuStream()

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class CpuStaging:
    """Anonymous shared memory; it vanishes with the last process that has it open."""

    def __init__(self, nbytes: int) -> None:
        self._descriptor = os.memfd_create("checkpoint-engine-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Reserving the pages now turns a shortage into an error here instead of a SIGBUS during the update.
            os.posix_fallocate(self._descriptor, 0, max(nbytes, 1))
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            self.tensor = view_of(self._descriptor, nbytes)
        except OSError as error:
            os.close(self._descriptor)
            raise DeviceMemoryError(
                f"cannot allocate {nbytes} bytes of staging in host memory: {error.strerror}"
            ) from error
        self.memory: Memory = HostMemory(nbytes)
        self.descriptors: tuple[int, ...] = (self._descriptor,)

    def close(self) -> None:
        """Frees the memory once nobody has it mapped any more."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if self.descriptors:
            os.close(self._descriptor)
            self.descriptors = ()


class CpuPinned:
    """Nothing was registered, so there is nothing to let go of."""

    def close(self) -> None:
        """Does nothing."""


class CpuEvent:
    """The time at which it was recorded."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def done(self) -> bool:
        """Everything before it is."""
        return True

    def synchronize(self) -> None:
        """Everything before it is done already."""

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between the two."""
        return self.time - earlier.time if isinstance(earlier, CpuEvent) else 0.0


class CpuStream:
    """Work is done in the calling thread, at once."""

    def active(self) -> AbstractContextManager[object]:
        """There is only one."""
        return contextlib.nullcontext()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes."""
        target.copy_(source)

    def record(self) -> CpuEvent:
        """Now."""
        return CpuEvent()
