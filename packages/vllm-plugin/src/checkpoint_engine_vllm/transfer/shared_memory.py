"""A trainer's tensors on this worker's GPU, opened by torch's own sharing, which keeps books of who uses what."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from checkpoint_engine.sdk.deliveries import torch_dtype
from checkpoint_engine_vllm.transfer.handles import Handle

__all__ = ["SharedTensors"]

_cuda: Any = torch.cuda
_reductions: Any = importlib.import_module("torch.multiprocessing.reductions")


class SharedTensors:
    """Opens handles; each stays open until `close`, for a buffer's comes again with every call of its update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._opened: dict[Handle, torch.Tensor] = {}

    @property
    def device(self) -> str:
        """What trainers call this worker's GPU."""
        return str(_cuda.get_device_properties(self._device).uuid)

    def open(self, handle: Handle) -> torch.Tensor:
        """The tensor behind a handle."""
        tensor = self._opened.get(handle)
        if tensor is None:
            self._opened[handle] = tensor = self.map(handle)
        return tensor

    def map(self, handle: Handle) -> torch.Tensor:
        """Opens one that is not open."""
        return _reductions.rebuild_cuda_tensor(
            torch.Tensor,
            handle.shape,
            handle.stride,
            handle.offset,
            torch.UntypedStorage,
            torch_dtype(handle.dtype),
            self._device.index or 0,
            handle.storage,
            handle.storage_bytes,
            handle.storage_offset,
            False,
            handle.counter,
            handle.counter_offset,
            handle.event,
            handle.event_must_be_awaited,
        )

    def close(self) -> None:
        """Gives them all back to the trainer."""
        self._opened.clear()
