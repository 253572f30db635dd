"""A segment of another process's device memory, mapped here: allocations that lie apart, there and here."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch

from checkpoint_engine.device.base import Mapped
from checkpoint_engine.device.memory import Allocation
from checkpoint_engine.errors import LinkError

__all__ = ["Import", "ImportedBlocks"]

Import = Callable[[Allocation], Mapped]
"""Maps one allocation."""


class ImportedBlocks:
    """Finds where in this process a byte of the segment lies."""

    def __init__(self, allocations: Sequence[Allocation], bring: Import) -> None:
        """Maps allocations, which are in ascending order and do not overlap.

        Raises:
            LinkError: one cannot be mapped here, or they are in no such order.
        """
        ends = [0, *(allocation.start + allocation.nbytes for allocation in allocations)]
        if any(each.start < end or each.nbytes < 0 for each, end in zip(allocations, ends, strict=False)):
            raise LinkError("the parameter server describes allocations that overlap")
        self._starts = [allocation.start for allocation in allocations]
        self._mapped: list[Mapped] = []
        try:
            for allocation in allocations:
                self._mapped.append(bring(allocation))
        except BaseException:
            self.close()
            raise
        self._tensors = [mapped.tensor for mapped in self._mapped]

    def locate(self, offset: int, nbytes: int) -> tuple[torch.Tensor, int]:
        """The allocation (1-D uint8) that holds these bytes of the segment, and where in it they begin.

        Raises:
            LinkError: none does.
        """
        number = bisect.bisect(self._starts, offset) - 1
        if number >= 0:
            block, begin = self._tensors[number], offset - self._starts[number]
            if begin + nbytes <= block.numel():
                return block, begin
        raise LinkError(f"bytes {offset} to {offset + nbytes} of a segment lie in none of its allocations")

    def close(self) -> None:
        """Unmaps them; their views must not be used any more."""
        mapped, self._mapped, self._tensors = self._mapped, [], []
        for each in mapped:
            each.close()
