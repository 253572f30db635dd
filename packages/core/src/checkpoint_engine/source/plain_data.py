"""Whether a tensor has bytes of its own: many kinds look like tensors and have none, and reading them is fatal."""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy

from checkpoint_engine.errors import UnsupportedTensorError

__all__ = ["require_data"]


def require_data(name: str, tensor: torch.Tensor) -> None:
    """Raises unless all elements of a tensor lie in memory.

    Raises:
        UnsupportedTensorError: it is sparse, nested, fake, lazy, on the meta device, made of other tensors, or freed.
    """
    why = _lacking(tensor)
    if why:
        raise UnsupportedTensorError(f"tensor {name!r} has no plain data: {why}")


def _lacking(tensor: torch.Tensor) -> str:
    """What keeps it from being read; empty if nothing does."""
    if is_lazy(tensor):
        return "it was never initialised; run the model once, or leave it out"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        return f"its layout is {layout} on {tensor.device}; pass a dense copy"
    kind = type(tensor).__name__
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != tensor.device.type:
            return f"it is a {kind}, which only describes a tensor; pass a real one"
        address, there = storage.data_ptr(), storage.nbytes()
    except RuntimeError:  # what torch says of a storage that stands for none
        return f"it is a {kind}, made of other tensors; pass those, or its dequantised or plain form"
    needed = _end(tensor) * tensor.element_size()
    if needed <= there and (address or not needed):
        return ""
    return (
        f"it needs {needed} bytes, of its storage {there} are there: it was freed, as FSDP does with parameters that "
        "it has sharded again; pass them while they are gathered, or clones of them"
    )


def _end(tensor: torch.Tensor) -> int:
    """Elements from the beginning of its storage to the end of its last one."""
    if not tensor.numel():
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + reach + 1
