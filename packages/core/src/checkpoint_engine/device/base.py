"""What the pipeline and the receiver need from a device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from checkpoint_engine.device.blocks import Block
from checkpoint_engine.device.memory import Allocation, Memory
from checkpoint_engine.planning.byte_runs import ByteRuns

__all__ = ["Device", "DeviceType", "Event", "ExportedMemory", "Mapped", "Pinned", "PreparedCopies", "Staging", "Stream"]


class Event(Protocol):
    """A point on a stream."""

    def done(self) -> bool:
        """Whether the device has come to this point."""
        ...

    def synchronize(self) -> None:
        """Blocks the calling thread until it has."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Time on the device between two events of one stream; both must have been reached."""
        ...


class Stream(Protocol):
    """An ordered queue of work on the device."""

    def active(self) -> AbstractContextManager[object]:
        """Within it, other libraries' work goes to this stream."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes; both are 1-D uint8 of the same length. Returns before the copy is done, where it can."""
        ...

    def record(self) -> Event:
        """An event behind all work queued so far."""
        ...


class ExportedMemory(Protocol):
    """Memory that an engine worker in another process can map."""

    memory: Memory
    """How it is described on the link."""

    descriptors: tuple[int, ...]
    """File descriptors that travel with the description."""

    def close(self) -> None:
        """Frees it."""
        ...


class Staging(ExportedMemory, Protocol):
    """Memory of the device, through which buckets go."""

    tensor: torch.Tensor
    """1-D uint8 over the whole of it."""


class Mapped(Protocol):
    """Another process's staging memory, mapped here."""

    @property
    def tensor(self) -> torch.Tensor:
        """1-D uint8 over the whole of it."""
        ...

    def close(self) -> None:
        """Unmaps it; `tensor` and its views must not be used any more."""
        ...


class Pinned(Protocol):
    """Host memory that the device can copy from at full speed."""

    def close(self) -> None:
        """Lets go of the memory."""
        ...


class PreparedCopies(Protocol):
    """Copies made ready; they can be done any number of times, out of any blocks."""

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Does them on the current stream of the targets' device; returns before they are done, where it can.

        Args:
            sources: 1-D uint8, one for each segment of the runs: memory of the targets' device, of another one that it
                reaches, or of the host. Unless that is registered with the device, copies out of it are slow. They must
                live until the copies are done.
            targets: In the order of the runs' numbers of targets; offsets count from a tensor's first element.
        """
        ...


class Device(Protocol):
    """One device of this process, or the CPU acting as one."""

    torch_device: torch.device
    name: str
    """For people: model and maker."""

    identity: str
    """Names the device among those of the host: `GPU-<uuid>`, or `cpu:<rank>`."""

    known_by_identity: bool
    """Whether every process of the host knows this device by the same identity: a rank finds its worker by it."""

    backend: str
    """The collective backend that moves tensors of this device, such as `nccl` or `gloo`."""

    def active(self) -> AbstractContextManager[object]:
        """Within it, this is the calling thread's current device."""
        ...

    def pci_address(self) -> str | None:
        """Where it sits, such as `0000:1b:00.0`; None if it is no PCI device."""
        ...

    def memory(self, *, reclaim: bool = True) -> tuple[int, int]:
        """Free and total bytes; `reclaim` first what this process's allocator has cached and does not use."""
        ...

    def allocate(self, nbytes: int) -> Staging:
        """Allocates staging memory.

        Raises:
            DeviceMemoryError: there is not enough.
        """
        ...

    def map(self, memory: Memory, descriptors: tuple[int, ...]) -> Mapped:
        """Maps staging memory of another process; takes over the descriptors.

        Raises:
            LinkError: it cannot be mapped here.
        """
        ...

    def import_block(self, allocation: Allocation, descriptor: int | None) -> Mapped:
        """Maps one allocation of another process's device memory; takes over the descriptor.

        Raises:
            LinkError: it cannot be mapped here.
        """
        ...

    def pin(self, buffer: torch.Tensor) -> Pinned:
        """Registers host memory, given as 1-D uint8, for copies to this device.

        Raises:
            HostMemoryError: the driver refuses; the message says why.
        """
        ...

    def find_block(self, tensor: torch.Tensor) -> Block:
        """The allocation that a tensor of this device lies in, for other processes to map.

        Raises:
            UnsupportedTensorError: they cannot; the message says why.
        """
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def synchronize_all(self) -> None:
        """Blocks until all work of this process on this device is done, whichever stream it is on."""
        ...

    def synchronize(self) -> None:
        """Blocks until the calling thread's current stream has run dry."""
        ...


class DeviceType(Protocol):
    """A type of device: what must be known of it before one of its devices is open, or without one."""

    name: str
    """As torch calls it, such as `cuda`; also what people choose it by."""

    backend: str
    """The collective backend that moves tensors of such devices, such as `nccl`."""

    def backend_version(self) -> str:
        """Of that backend, for people; empty if it has none of its own."""
        ...

    def count(self) -> int:
        """How many of them this process sees."""
        ...

    def open(self, index: int, rank: int) -> Device:
        """Opens one.

        Args:
            index: Its number, as torch counts them in this process.
            rank: Names it where devices of this type have no number.

        Raises:
            SettingError: there is no such device.
            MissingDependencyError: it needs a library that is not installed.
        """
        ...

    def synchronize(self, device: torch.device) -> None:
        """Blocks until the calling thread's current stream of that device has run dry."""
        ...

    def synchronize_all(self) -> None:
        """Blocks until all work that this process has given to the current device of this type is done."""
        ...

    def download(self, device: torch.device, copies: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Copies contiguous tensors of that device to addresses in host memory, which it should have pinned.

        Whatever wrote them must be done. Blocks until they have arrived.

        Raises:
            CheckpointEngineError: the driver refuses.
        """
        ...

    def prepare_copies(
        self, runs: ByteRuns, device: torch.device, *, source_stays: bool, targets_stay: bool
    ) -> PreparedCopies:
        """See `checkpoint_engine.device.prepare_copies`."""
        ...
