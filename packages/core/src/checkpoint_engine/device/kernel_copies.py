"""Many copies inside one device's memory, by kernels that each do a hundred of them.

The driver's own copies cost 6 µs of the caller's time each, which is more than their bytes take: on an H200, 9,435 of
them (31 GB) last 54 ms in batches, on one stream or on sixteen, and 21 ms by these kernels; one copy of all, 15 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.planning.byte_runs import Runs

__all__ = ["KernelCopies"]

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""From fast to slow: 1.3 times between the first and the last two."""


class KernelCopies:
    """Views of words, kept from one call to the next: for memory on both sides that stays where it is."""

    def __init__(self, runs: Runs) -> None:
        """Takes runs of one row each."""
        self._runs = runs
        self._addresses: tuple[list[int], list[int]] = [], []
        self._copies: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Queues the copies on the current stream; everything lies on its device."""
        addresses = [source.data_ptr() for source in sources], [target.data_ptr() for target in targets]
        if addresses != self._addresses:
            self._copies = list(self._views(sources, targets))
            self._addresses = addresses
        for into, out_of in self._copies:
            # Torch has no public name for many copies in one call, and its optimisers rely on this one.
            cast("Any", torch)._foreach_copy_(into, out_of)

    def _views(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Targets and sources, as words as wide as all of the addresses and the size allow."""
        runs = self._runs
        begins, offsets = _begins(sources)[runs.segment] + runs.source, _begins(targets)[runs.target] + runs.offset
        left = runs.width > 0
        for word in _WORDS:
            size = word.itemsize
            chosen = left & ((begins | offsets | runs.width) % size == 0)
            left &= ~chosen
            if not chosen.any():
                continue
            columns = (runs.segment, begins // size, runs.target, offsets // size, runs.width // size)
            rows = cast("list[list[int]]", cast("Any", torch.stack(columns, 1)[chosen]).tolist())
            out_of, into = [_words(source, word) for source in sources], [_words(target, word) for target in targets]
            yield (
                [into[target].as_strided((width,), (1,), offset) for _, _, target, offset, width in rows],
                [out_of[segment].as_strided((width,), (1,), begin) for segment, begin, _, _, width in rows],
            )


def _begins(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where each tensor begins in its storage, in bytes."""
    begins = [int(tensor.storage_offset()) * tensor.itemsize for tensor in tensors]
    return torch.tensor(begins, dtype=torch.int64, device=torch.device("cpu"))


def _words(tensor: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """All of the storage that a tensor lies in; what is no whole word at its end is left out."""
    return torch.empty(0, dtype=word, device=tensor.device).set_(cast("Any", tensor.untyped_storage()))
