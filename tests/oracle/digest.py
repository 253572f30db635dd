"""A tensor's contents as a short text that two processes can compare."""

from __future__ import annotations

import hashlib

import torch

_HEX = 16
"""Digits kept of a digest."""


def digest(tensor: torch.Tensor) -> str:
    """Dtype, shape and a hash of the elements in their order, wherever they lie and with whatever strides."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if tensor.is_meta:
        return f"{kind} without data"
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return f"{kind} {hashlib.blake2b(_raw(tensor.detach())).hexdigest()[:_HEX]}"


def _raw(tensor: torch.Tensor) -> memoryview:
    plain = tensor.to_dense() if tensor.is_mkldnn or tensor.layout != torch.strided else tensor
    whole = plain.cpu().contiguous().reshape(-1)
    return memoryview(whole.view(torch.uint8).numpy()) if whole.numel() else memoryview(b"")
