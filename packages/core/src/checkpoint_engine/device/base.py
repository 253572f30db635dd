"""What the pipeline and the receiver need from a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from checkpoint_engine.link.messages import CudaMemory, HostMemory, SharedSegments

Memory = HostMemory | CudaMemory | SharedSegments


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


class Lendable(Protocol):
    """Memory that an engine worker in another process can map."""

    memory: Memory
    """How it is described on the link."""

    descriptors: tuple[int, ...]
    """File descriptors that travel with the description."""

    def close(self) -> None:
        """Frees it."""
        ...


class Staging(Lendable, Protocol):
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


class Device(Protocol):
    """One device of this process, or the CPU acting as one."""

    torch_device: torch.device
    identity: str
    """Names the same physical device in every process of the host: `GPU-<uuid>`, or `cpu:<rank>`."""

    backend: str
    """The collective backend that moves tensors of this device, such as `nccl` or `gloo`."""

    def active(self) -> AbstractContextManager[object]:
        """Within it, this is the calling thread's current device."""
        ...

    def pci_address(self) -> str | None:
        """Where it sits, such as `0000:1b:00.0`; None if it is no PCI device."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
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

    def pin(self, buffer: torch.Tensor) -> Pinned:
        """Registers host memory, given as 1-D uint8, for copies to this device.

        Raises:
            HostMemoryError: the driver refuses; the message says why.
        """
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def synchronize(self) -> None:
        """Blocks until the calling thread's current stream has run dry."""
        ...
