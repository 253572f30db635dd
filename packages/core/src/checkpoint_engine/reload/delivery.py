"""The tensors of one bucket, as an adapter is given them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch


class Delivery(Sequence[tuple[str, torch.Tensor]]):
    """Names and tensors, all of them views of one block of memory.

    Where that block stays mapped from one update to the next, so does this very object: whoever has worked out what to
    do with it can use that again. Two of them are never equal.
    """

    def __init__(self, pairs: Sequence[tuple[str, torch.Tensor]], memory: torch.Tensor, *, stays: bool = False) -> None:
        """Takes over `pairs`; `memory` is 1-D uint8 over the block; `stays` says that this object comes again."""
        self._pairs = tuple(pairs)
        self.memory = memory
        self.stays = stays
        self.nbytes = sum(tensor.nbytes for _, tensor in self._pairs)
        """Bytes of the tensors."""
        self.names = frozenset(name for name, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._pairs)

    @overload
    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, torch.Tensor]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, torch.Tensor] | Sequence[tuple[str, torch.Tensor]]:
        return self._pairs[index]

    def place_of(self, tensor: torch.Tensor) -> int:
        """How many bytes into the block a tensor begins."""
        return tensor.data_ptr() - self.memory.data_ptr()
