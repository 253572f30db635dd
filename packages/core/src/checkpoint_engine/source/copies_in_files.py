"""The same tensor out of two places of one rank: equal bytes are taken once, others are refused."""

from __future__ import annotations

import os

import torch

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.dtypes import dtype_name
from checkpoint_engine.errors import CheckpointFormatError
from checkpoint_engine.source.safetensors_file import SafetensorsFile

__all__ = ["is_same_in_file", "is_same_in_files"]

_PIECE = 8 << 20


def is_same_in_files(one: SafetensorsFile, tensor: TensorEntry, other: SafetensorsFile, again: TensorEntry) -> bool:
    """Whether a tensor has the same dtype, shape and bytes in both.

    Raises:
        CheckpointFormatError: a file is gone, or was changed.
    """
    if (tensor.dtype, tensor.shape) != (again.dtype, again.shape):
        return False
    with one.open() as first, other.open() as second:
        return all(
            _read(one, first, tensor, start) == _read(other, second, again, start)
            for start in range(0, tensor.nbytes, _PIECE)
        )


def is_same_in_file(file: SafetensorsFile, entry: TensorEntry, tensor: torch.Tensor) -> bool:
    """Whether a tensor in memory, on whatever device, is the one in a file, bit by bit.

    Raises:
        CheckpointFormatError: the file is gone, or was changed.
    """
    if (entry.dtype, entry.shape) != (dtype_name(tensor.dtype), tuple(tensor.shape)):
        return False
    held = tensor.detach().reshape(-1).view(torch.uint8)
    with file.open() as descriptor:
        return all(
            bytes(held[start : start + _PIECE].cpu().numpy()) == _read(file, descriptor, entry, start)
            for start in range(0, entry.nbytes, _PIECE)
        )


def _read(file: SafetensorsFile, descriptor: int, tensor: TensorEntry, start: int) -> bytes:
    wanted = min(_PIECE, tensor.nbytes - start)
    piece = os.pread(descriptor, wanted, file.data_start + tensor.offset + start)
    if len(piece) < wanted:
        raise CheckpointFormatError(f"{file.path} was truncated while it was being read")
    return piece
