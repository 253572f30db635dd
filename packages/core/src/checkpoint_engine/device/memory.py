"""How memory is described to the process that is to map it: as such a description goes over a link."""

from __future__ import annotations

import msgspec

__all__ = ["Allocation", "CudaMemory", "HostMemory", "Memory", "SharedSegments"]


class HostMemory(msgspec.Struct, frozen=True, tag=True):
    """Host memory; its file descriptor comes with the description.

    `lease` names this very allocation if the other process may keep it mapped after the update; else it is empty.
    """

    nbytes: int
    lease: str = ""


class CudaMemory(msgspec.Struct, frozen=True, tag=True):
    """Memory of a GPU that both sides share: a raw `cudaIpcMemHandle_t` of 64 bytes. `lease` as above."""

    nbytes: int
    handle: bytes
    lease: str = ""


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """One allocation of a segment of device memory, which begins `start` bytes into that segment.

    `handle` is a raw `cudaIpcMemHandle_t`; if it is empty, a file descriptor comes instead.
    """

    start: int
    nbytes: int
    handle: bytes = b""


class SharedSegments(msgspec.Struct, frozen=True, tag=True):
    """Memory of the parameter server's ranks, from which the worker copies.

    A segment of host memory comes as a file descriptor. One of device memory is in `allocations`, under its number:
    what the rank's tensors lie in, with gaps between; file descriptors come for those allocations that need them.
    `lease` names these very segments if the receiver may keep them mapped after the update; else it is empty.
    """

    sizes: tuple[int, ...]
    lease: str = ""
    allocations: dict[int, tuple[Allocation, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes)


Memory = HostMemory | CudaMemory | SharedSegments
"""Whatever can be described. Tagged: a receiver that does not know a kind refuses it by its name."""
