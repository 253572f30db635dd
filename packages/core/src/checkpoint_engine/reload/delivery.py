"""The tensors of one bucket, as an adapter is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import overload

import torch

Pairs = Sequence[tuple[str, torch.Tensor]]


class Delivery(Pairs):
    """Names and tensors, all of them views of one block of memory, which are made once somebody asks for them.

    Whoever has worked out what to do with them can use that again: where the block stays mapped from one update to the
    next, this very object comes again, and elsewhere its `bucket` does. Two of either are never equal.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        nbytes: int,
        view: Callable[[], Pairs],
        memory: torch.Tensor,
        *,
        start: int = 0,
        bucket: object | None = None,
        stays: bool = False,
    ) -> None:
        """Takes it over.

        Args:
            names: Of the tensors, in order.
            nbytes: Of the tensors.
            view: Makes the pairs.
            memory: 1-D uint8 over the block.
            start: Where in the block the bucket lies.
            bucket: The same for all deliveries whose tensors lie in the same places, counted from `start`; None if
                tensors lie elsewhere.
            stays: Whether this object comes again.
        """
        self.names = names
        self.nbytes = nbytes
        self._view = view
        self.memory = memory
        self.start = start
        self.bucket = bucket
        self.stays = stays

    @cached_property
    def _pairs(self) -> Pairs:
        return tuple(self._view())

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._pairs)

    @overload
    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> tuple[str, torch.Tensor] | Pairs:
        return self._pairs[index]

    def place_of(self, tensor: torch.Tensor) -> int:
        """How many bytes into the bucket a tensor begins."""
        return tensor.data_ptr() - self.memory.data_ptr() - self.start


def names_of(tensors: Pairs) -> tuple[str, ...]:
    """The names alone, without a view of any tensor."""
    return tensors.names if isinstance(tensors, Delivery) else tuple(name for name, _ in tensors)


def nbytes_of(tensors: Pairs) -> int:
    """Bytes of all tensors."""
    return tensors.nbytes if isinstance(tensors, Delivery) else sum(tensor.nbytes for _, tensor in tensors)
