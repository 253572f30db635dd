"""The tensors of one bucket, as a sink is given them."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, overload

import torch

from checkpoint_engine.boxes import TensorBox

__all__ = ["Delivery", "Pairs", "Place", "names_of", "nbytes_of"]

Pairs = Sequence[tuple[str, torch.Tensor]]


class Place(NamedTuple):
    """Where a tensor, or a box of it, lies in the memory that it is delivered in."""

    block: int
    """Number of the block."""
    at: int
    """Bytes into it."""
    whole: tuple[int, ...] = ()
    """Shape of the tensor, where only a box of it lies there."""
    box: TensorBox | None = None
    """That box; None for all of the tensor."""


class Delivery(Pairs):
    """Names and tensors, all of them views of a few blocks of memory, which are made once somebody asks for them.

    Whoever has worked out what to do with them can use that again: where the blocks stay mapped from one update to the
    next, this very object comes again, and elsewhere its `bucket` does. Two of either are never equal.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        nbytes: int,
        view: Callable[[], Pairs],
        blocks: Sequence[torch.Tensor],
        *,
        bucket: object | None = None,
        stays: bool = False,
    ) -> None:
        """Takes it over.

        Args:
            names: Of the tensors, in order.
            nbytes: Of the tensors.
            view: Makes the pairs.
            blocks: The memory, 1-D uint8; no tensor lies in two of them.
            bucket: The same for all deliveries whose tensors lie at the same offsets in their blocks; None if there is
                none like it.
            stays: Whether this object comes again.
        """
        self.names = names
        self.nbytes = nbytes
        self._view = view
        self.blocks = blocks
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

    def places(self) -> Iterator[tuple[Place, ...]]:
        """Where each tensor lies: in one place, or in boxes that make it up.

        Raises:
            ValueError: a tensor lies in none of the blocks.
        """
        return ((Place(block, at),) for block, at in self._located())

    def part(self, numbers: Sequence[int]) -> Delivery:
        """A few of the tensors, by their numbers, with the blocks that they lie in; it stays if this does."""
        pairs, locations = tuple(self[number] for number in numbers), self._locations
        used = sorted({locations[number][0] for number in numbers})
        return Delivery(
            tuple(name for name, _ in pairs),
            sum(tensor.nbytes for _, tensor in pairs),
            lambda: pairs,
            [self.blocks[number] for number in used],
            bucket=object() if self.stays else None,
            stays=self.stays,
        )

    @cached_property
    def _locations(self) -> Sequence[tuple[int, int]]:
        return tuple(self._located())

    def _located(self) -> Iterator[tuple[int, int]]:
        """The number of the block that each tensor lies in, and how many bytes into it."""
        order = sorted(range(len(self.blocks)), key=lambda number: self.blocks[number].data_ptr())
        starts = [self.blocks[number].data_ptr() for number in order]
        for name, tensor in self:
            address, found = tensor.data_ptr(), 0
            if tensor.nbytes:
                found = bisect(starts, address) - 1
                if found < 0 or address + tensor.nbytes > starts[found] + self.blocks[order[found]].nbytes:
                    raise ValueError(f"tensor {name!r} does not lie in the memory that it is delivered in")
            yield order[found], address - starts[found] if tensor.nbytes else 0


def names_of(tensors: Pairs) -> tuple[str, ...]:
    """The names alone, without a view of any tensor."""
    return tensors.names if isinstance(tensors, Delivery) else tuple(name for name, _ in tensors)


def nbytes_of(tensors: Pairs) -> int:
    """Bytes of all tensors."""
    return tensors.nbytes if isinstance(tensors, Delivery) else sum(tensor.nbytes for _, tensor in tensors)
