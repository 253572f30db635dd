"""Allocations of this process that others of its host can map, as whoever allocated them got them.

A tensor lies somewhere in an allocation, and a model's tensors lie in thousands of them. Handing out an allocation
copies nothing, and those who map it see every later change.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Block", "BlockTable"]


@dataclass(frozen=True)
class Block:
    """One allocation."""

    address: int
    """In this process."""
    nbytes: int
    identity: int
    """That of no other allocation of this process, not even of one at the same address later."""
    handle: bytes = b""
    """The driver's, for memory of a GPU; memory of the host has a `descriptor`."""
    descriptor: int = -1


class BlockTable:
    """The allocations that some tensors lie in, each found once, by ascending address."""

    def __init__(self, find: Callable[[torch.Tensor], Block]) -> None:
        """`find` is asked for the allocation of a tensor."""
        self._find = find
        self._starts: list[int] = []
        self.blocks: list[Block] = []

    def add(self, tensor: torch.Tensor) -> None:
        """Notes the allocation that a tensor lies in.

        Raises:
            UnsupportedTensorError: others cannot map it.
        """
        address = tensor.data_ptr()
        index = bisect.bisect(self._starts, address) - 1
        if index >= 0 and address < self._starts[index] + self.blocks[index].nbytes:
            return
        block = self._find(tensor)
        index = bisect.bisect(self._starts, block.address)
        self._starts.insert(index, block.address)
        self.blocks.insert(index, block)
