"""The CPU as a device of its own right: staging is anonymous shared memory, copies are done when they return."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from checkpoint_engine.device.base import Event
from checkpoint_engine.device.blocks import Block
from checkpoint_engine.device.host_copies import HostCopies
from checkpoint_engine.device.host_memory import CpuMapped, map_block, map_host_memory, view_of
from checkpoint_engine.device.memory import Allocation, HostMemory, Memory, SharedSegments
from checkpoint_engine.device.segments import MappedSegments, map_segments
from checkpoint_engine.errors import DeviceMemoryError, LinkError, UnsupportedTensorError
from checkpoint_engine.host.memory import free_host_memory
from checkpoint_engine.planning.byte_runs import ByteRuns

__all__ = ["CpuDevice", "CpuEvent", "CpuPinned", "CpuStaging", "CpuStream", "CpuType"]


class CpuType:
    """The host itself."""

    name = "cpu"
    backend = "gloo"

    def backend_version(self) -> str:
        """It is a part of torch."""
        return ""

    def count(self) -> int:
        """There is only one CPU."""
        return 1

    def open(self, index: int, rank: int) -> CpuDevice:
        """The CPU, as the device of that rank."""
        del index
        return CpuDevice(rank)

    def synchronize(self, device: torch.device) -> None:
        """Nothing is ever under way."""
        del device

    def synchronize_all(self) -> None:
        """Nothing is ever under way."""

    def download(self, device: torch.device, copies: Sequence[tuple[int, torch.Tensor]]) -> None:
        """From one place of the host's memory to another."""
        del device
        for address, tensor in copies:
            ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)

    def prepare_copies(
        self, runs: ByteRuns, device: torch.device, *, source_stays: bool, targets_stay: bool
    ) -> HostCopies:
        """Views of memory, made once."""
        del device
        return HostCopies(runs, source_stays=source_stays, targets_stay=targets_stay)


class CpuDevice:
    """Host memory behind the same protocol as a GPU."""

    name = "CPU"
    backend = CpuType.backend
    known_by_identity = False

    def __init__(self, rank: int) -> None:
        self.torch_device = torch.device("cpu")
        self.identity = f"cpu:{rank}"

    def active(self) -> AbstractContextManager[object]:
        """There is only one CPU."""
        return contextlib.nullcontext()

    def pci_address(self) -> None:
        """The CPU is no PCI device."""

    def memory(self, *, reclaim: bool = True) -> tuple[int, int]:
        """Bytes of host memory that can still be taken, and all that the host has."""
        del reclaim
        return free_host_memory().nbytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

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

    def import_block(self, allocation: Allocation, descriptor: int | None) -> CpuMapped:
        """Maps host memory that a trainer shares.

        Raises:
            LinkError: it is memory of a GPU, or smaller than was said.
        """
        if descriptor is None:
            raise LinkError("the parameter server's tensors stay on a GPU, but this engine worker runs on the CPU")
        return map_block(descriptor, allocation.nbytes)

    def pin(self, buffer: torch.Tensor) -> CpuPinned:
        """Nothing to do: the CPU copies from any memory at full speed."""
        del buffer
        return CpuPinned()

    def find_block(self, tensor: torch.Tensor) -> Block:
        """The storage that a tensor lies in, if that was made to be shared (`Tensor.share_memory_`).

        Raises:
            UnsupportedTensorError: it was not.
        """
        storage = tensor.untyped_storage()
        if not storage.is_shared():
            raise UnsupportedTensorError("it lies in memory of its own process alone; see torch's share_memory_")
        theirs, nbytes = cast("Any", storage)._share_fd_cpu_()  # as torch.multiprocessing does
        return Block(storage.data_ptr(), int(nbytes), os.fstat(theirs).st_ino, descriptor=os.dup(theirs))

    def stream(self) -> CpuStream:
        """A stream whose work is done when the call returns."""
        return CpuStream()

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def synchronize_all(self) -> None:
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
