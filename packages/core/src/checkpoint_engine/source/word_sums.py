"""A sum over bytes that is as fast as memory is read, and changes with any bit that flips alone."""

from __future__ import annotations

import torch

__all__ = ["sum_of_words"]

_WORD = 8
"""Bytes."""
_PLACES = torch.arange(0, 8 * _WORD, 8)
"""Of bytes in a word."""


def sum_of_words(data: torch.Tensor) -> torch.Tensor:
    """Of 64-bit words, modulo 2^64, of 1-D uint8 in host memory; a scalar of int64."""
    whole = data.numel() // _WORD * _WORD
    words = data[:whole]
    if words.storage_offset() % _WORD:
        words = words.clone()
    return words.view(torch.int64).sum() + (data[whole:].to(torch.int64) << _PLACES[: data.numel() - whole]).sum()
