"""Allocations of torch's on a GPU: handed out by the driver's own handles, and mapped in another process."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from checkpoint_engine.device.blocks import Block
from checkpoint_engine.errors import MissingDependencyError, UnsupportedTensorError

__all__ = ["HANDLE_BYTES", "CudaBlocks"]

HANDLE_BYTES = 64
"""sizeof(cudaIpcMemHandle_t), which the bindings keep opaque."""


class CudaBlocks:
    """Finds allocations of this process."""

    def __init__(self, runtime: Any) -> None:  # noqa: ANN401 - the CUDA bindings carry no types
        self._runtime = runtime
        self._driver = _load_driver()

    def find(self, tensor: torch.Tensor) -> Block:
        """The allocation that a tensor lies in.

        Raises:
            UnsupportedTensorError: the driver cannot hand it out.
        """
        driver, address = self._driver, tensor.data_ptr()
        error, base, nbytes = driver.cuMemGetAddressRange(address)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise UnsupportedTensorError(f"the driver does not know the allocation at {address:#x} ({error})")
        attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID
        error, identity = driver.cuPointerGetAttribute(attribute, address)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise UnsupportedTensorError(f"the driver has no number for the allocation at {address:#x} ({error})")
        return Block(int(base), int(nbytes), int(identity), self._handle_of(int(base)))

    def _handle_of(self, base: int) -> bytes:
        error, handle = self._runtime.cudaIpcGetMemHandle(base)
        if error != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()  # the error is sticky and would be blamed on the next kernel
            raise UnsupportedTensorError(
                "the driver hands out only what cudaMalloc gave, so neither expandable segments "
                "(PYTORCH_CUDA_ALLOC_CONF) nor memory pools of other kinds"
            )
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)


def _load_driver() -> Any:  # noqa: ANN401 - the CUDA bindings carry no types
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingDependencyError(
            f"GPUs need NVIDIA's cuda-bindings ({error}): pip install 'checkpoint-engine-core[cuda]'"
        ) from error
