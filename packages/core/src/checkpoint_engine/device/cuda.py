"""NVIDIA GPUs. What torch does not wrap goes through NVIDIA's own `cuda-bindings`.

Staging is allocated outside torch's caching allocator: its handle then stands for exactly this allocation, whatever
allocator settings the two environments have, and freeing it gives the memory back to the driver.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch.cuda import nccl

from checkpoint_engine.device.base import Event
from checkpoint_engine.device.blocks import Block
from checkpoint_engine.device.copy_calls import load_copy_calls
from checkpoint_engine.device.cuda_blocks import HANDLE_BYTES, CudaBlocks
from checkpoint_engine.device.cuda_copies import CudaCopies
from checkpoint_engine.device.host_memory import CpuMapped, map_host_memory
from checkpoint_engine.device.memory import Allocation, CudaMemory, HostMemory, Memory, SharedSegments
from checkpoint_engine.device.pages import TOUCH_TO_READ, advise
from checkpoint_engine.device.segments import MappedSegments, map_segments
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeviceMemoryError,
    HostMemoryError,
    LinkError,
    MissingDependencyError,
    SettingError,
)
from checkpoint_engine.planning.byte_runs import ByteRuns

__all__ = ["CudaDevice", "CudaEvent", "CudaMapped", "CudaPinned", "CudaStaging", "CudaStream", "CudaType", "check"]

_PCI_TEXT_BYTES = 32


class CudaType:
    """GPUs that torch reaches by CUDA."""

    name = "cuda"
    backend = "nccl"

    def backend_version(self) -> str:
        """Of the NCCL that torch brings."""
        return ".".join(map(str, nccl.version()))

    def count(self) -> int:
        """As torch sees them; `CUDA_VISIBLE_DEVICES` counts."""
        return torch.cuda.device_count()

    def open(self, index: int, rank: int) -> CudaDevice:
        """The GPU of that number.

        Raises:
            SettingError: there is none.
            MissingDependencyError: the bindings are not installed.
        """
        del rank
        return CudaDevice(index)

    def synchronize(self, device: torch.device) -> None:
        """Waits for the current stream only."""
        torch.cuda.current_stream(device).synchronize()

    def synchronize_all(self) -> None:
        """Waits for all streams of the current GPU, if this process uses one."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def download(self, device: torch.device, copies: Sequence[tuple[int, torch.Tensor]]) -> None:
        """In batches: a thread that copied one after the other would wait for each.

        Raises:
            CheckpointEngineError: the driver refuses.
        """
        targets, sources, sizes = (
            torch.tensor(column, dtype=torch.int64, device=torch.device("cpu"))
            for column in zip(*((address, tensor.data_ptr(), tensor.nbytes) for address, tensor in copies), strict=True)
        )
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            load_copy_calls().copy(targets, sources, sizes, stream.cuda_stream)
            stream.synchronize()

    def prepare_copies(
        self, runs: ByteRuns, device: torch.device, *, source_stays: bool, targets_stay: bool
    ) -> CudaCopies:
        """Arrays of addresses, worked out anew for every block and every set of tensors unless both stay."""
        return CudaCopies(runs, device, stay=source_stays and targets_stay)


class CudaDevice:
    """One GPU of this process."""

    backend = CudaType.backend
    known_by_identity = True

    def __init__(self, index: int) -> None:
        count = torch.cuda.device_count()
        if not 0 <= index < count:
            raise SettingError(f"there is no CUDA device {index}; torch sees {count} (CUDA_VISIBLE_DEVICES?)")
        self._runtime = _load_runtime()
        self._blocks = CudaBlocks(self._runtime)
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        properties = cast("Any", torch.cuda.get_device_properties(index))  # pyright: ignore[reportUnknownMemberType]
        self.name: str = properties.name
        self.identity = f"GPU-{properties.uuid}"

    def active(self) -> AbstractContextManager[object]:
        """Makes it the calling thread's current device."""
        return torch.cuda.device(self.torch_device)

    def pci_address(self) -> str | None:
        """Where it sits, as the driver writes it."""
        error, text = self._runtime.cudaDeviceGetPCIBusId(_PCI_TEXT_BYTES, self.torch_device.index)
        failed = error != self._runtime.cudaError_t.cudaSuccess
        return None if failed else text.rstrip(b"\0").decode()

    def memory(self, *, reclaim: bool = True) -> tuple[int, int]:
        """Free and total bytes."""
        if reclaim:
            torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)

    def allocate(self, nbytes: int) -> CudaStaging:
        """Allocates memory that another process can map.

        Raises:
            DeviceMemoryError: there is not enough.
        """
        with torch.cuda.device(self.torch_device):
            return CudaStaging(self._runtime, self.torch_device, nbytes)

    def map(self, memory: Memory, descriptors: tuple[int, ...]) -> CudaMapped | CpuMapped | MappedSegments:
        """Maps memory of another process, on the GPU or of the host.

        Raises:
            LinkError: it cannot be mapped here.
        """
        if isinstance(memory, SharedSegments):
            return map_segments(self, memory, descriptors)
        if isinstance(memory, HostMemory):
            return map_host_memory(memory, descriptors)
        with torch.cuda.device(self.torch_device):
            return CudaMapped(self._runtime, self.torch_device, memory)

    def import_block(self, allocation: Allocation, descriptor: int | None) -> CudaMapped:
        """Maps memory of this GPU, or of one that it reaches.

        Raises:
            LinkError: it is none.
        """
        if descriptor is not None:
            os.close(descriptor)
            raise LinkError(
                "the parameter server's tensors stay in host memory of its own, which this engine's GPU cannot copy "
                "from; register them without in_place=True"
            )
        with torch.cuda.device(self.torch_device):
            return CudaMapped(self._runtime, self.torch_device, CudaMemory(allocation.nbytes, allocation.handle))

    def pin(self, buffer: torch.Tensor) -> CudaPinned:
        """Registers host memory with the driver.

        Raises:
            HostMemoryError: the driver refuses.
        """
        with torch.cuda.device(self.torch_device):
            return CudaPinned(self._runtime, buffer)

    def find_block(self, tensor: torch.Tensor) -> Block:
        """The allocation that a tensor lies in, with the driver's handle of it.

        Raises:
            UnsupportedTensorError: the driver cannot hand it out.
        """
        with torch.cuda.device(self.torch_device):
            return self._blocks.find(tensor)

    def stream(self) -> CudaStream:
        """A new stream of this GPU."""
        return CudaStream(self._runtime, self.torch_device)

    def synchronize(self) -> None:
        """Waits for the current stream only."""
        torch.cuda.current_stream(self.torch_device).synchronize()

    def synchronize_all(self) -> None:
        """Waits for all streams of this process."""
        torch.cuda.synchronize(self.torch_device)


class CudaStaging:
    """An allocation of the driver and its IPC handle."""

    def __init__(self, runtime: Any, device: torch.device, nbytes: int) -> None:
        self._runtime = runtime
        error, self._pointer = runtime.cudaMalloc(max(nbytes, 1))
        if error != runtime.cudaError_t.cudaSuccess:
            free, total = torch.cuda.mem_get_info(device)
            raise DeviceMemoryError(
                f"cannot allocate {nbytes} bytes of staging on {device}: {free} of {total} bytes are free "
                f"({_describe(runtime, error)})"
            )
        handle = check(runtime, runtime.cudaIpcGetMemHandle(self._pointer), "making the GPU memory shareable")
        self.memory: Memory = CudaMemory(nbytes, ctypes.string_at(handle.getPtr(), HANDLE_BYTES))
        self.descriptors: tuple[int, ...] = ()
        self.tensor = _as_tensor(self._pointer, nbytes, device)

    def close(self) -> None:
        """Gives the memory back to the driver."""
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            self.tensor = torch.empty(0, dtype=torch.uint8)
            check(self._runtime, self._runtime.cudaFree(pointer), "freeing the staging memory")


class CudaMapped:
    """GPU memory of another process."""

    def __init__(self, runtime: Any, device: torch.device, memory: CudaMemory) -> None:
        self._runtime = runtime
        if len(memory.handle) != HANDLE_BYTES:
            raise LinkError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, {len(memory.handle)} came")
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), memory.handle, HANDLE_BYTES)
        error, self._pointer = runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
        if error != runtime.cudaError_t.cudaSuccess:
            raise LinkError(
                f"cannot map the parameter server's staging memory on {device}: {_describe(runtime, error)}; both "
                "sides must see the same GPU, and share the IPC and PID namespaces if they run in containers"
            )
        self.tensor = _as_tensor(self._pointer, memory.nbytes, device)

    def close(self) -> None:
        """Unmaps it."""
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            self.tensor = torch.empty(0, dtype=torch.uint8)
            check(self._runtime, self._runtime.cudaIpcCloseMemHandle(pointer), "unmapping the staging memory")


class CudaPinned:
    """Host memory registered with the driver, as a whole: no copy may straddle two registrations."""

    def __init__(self, runtime: Any, buffer: torch.Tensor) -> None:
        self._runtime = runtime
        self._buffer = buffer  # keeps the mapping alive for as long as the driver knows of it
        self._pointer = buffer.data_ptr() if buffer.nbytes else 0
        if not self._pointer:
            return
        # The driver takes pages one by one, and has each that is not mapped here yet mapped alone; the kernel by itself
        # maps many of them at once. If it does not do so, registering takes longer.
        advise(self._pointer, buffer.nbytes, TOUCH_TO_READ)
        (error,) = runtime.cudaHostRegister(self._pointer, buffer.nbytes, runtime.cudaHostRegisterPortable)
        if error != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # the error is sticky and would be blamed on the next kernel
            raise HostMemoryError(
                f"the CUDA driver cannot pin {buffer.nbytes} bytes of host memory: {_describe(runtime, error)}; "
                "raise the memlock limit (ulimit -l) or free host memory"
            )

    def close(self) -> None:
        """Unregisters it."""
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            check(self._runtime, self._runtime.cudaHostUnregister(pointer), "unpinning host memory")


class CudaEvent:
    """A timed event."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def done(self) -> bool:
        """Whether the GPU has come here."""
        return self.event.query()

    def synchronize(self) -> None:
        """Blocks until the GPU has come here."""
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        """Seconds on the GPU between the two."""
        return earlier.event.elapsed_time(self.event) / 1000 if isinstance(earlier, CudaEvent) else 0.0


class CudaStream:
    """A stream of one GPU."""

    def __init__(self, runtime: Any, device: torch.device) -> None:
        self._runtime = runtime
        self._stream = torch.cuda.Stream(device)

    def active(self) -> AbstractContextManager[object]:
        """Makes it torch's current stream."""
        return torch.cuda.stream(self._stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues one plain memory copy; torch's own `copy_` would check and record far more than is needed."""
        check(
            self._runtime,
            self._runtime.cudaMemcpyAsync(
                target.data_ptr(),
                source.data_ptr(),
                source.nbytes,
                self._runtime.cudaMemcpyKind.cudaMemcpyDefault,
                self._stream.cuda_stream,
            ),
            f"copying {source.nbytes} bytes to the GPU",
        )

    def record(self) -> CudaEvent:
        """An event behind all work queued so far."""
        return CudaEvent(self._stream)


class _DeviceArray:
    """Lets torch see memory that it did not allocate (CUDA Array Interface, version 3)."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def _load_runtime() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            f"GPUs need NVIDIA's cuda-bindings ({error}): pip install 'checkpoint-engine-core[cuda]'"
        ) from error


def _as_tensor(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_DeviceArray(int(pointer), nbytes), device=device)


def check(runtime: Any, result: tuple[Any, ...], doing: str) -> Any:
    """What a call of the runtime returned besides its error.

    Raises:
        CheckpointEngineError: it failed while `doing` something.
    """
    error = result[0]
    if error != runtime.cudaError_t.cudaSuccess:
        raise CheckpointEngineError(f"CUDA failed while {doing}: {_describe(runtime, error)}")
    return result[1] if len(result) > 1 else None


def _describe(runtime: Any, error: Any) -> str:
    _, name = runtime.cudaGetErrorName(error)
    _, text = runtime.cudaGetErrorString(error)
    return f"{name.decode()}: {text.decode()}"
