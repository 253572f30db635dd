"""Byte runs carried out in the host's memory: out of blocks of it into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from checkpoint_engine.planning.byte_runs import ByteRuns

__all__ = ["HostCopies"]

_HERE = torch.device("cpu")


class HostCopies:
    """Views of bytes, copied by torch. They keep memory mapped that stays."""

    def __init__(self, runs: ByteRuns, *, source_stays: bool, targets_stay: bool) -> None:
        self._source_stays, self._targets_stay = source_stays, targets_stay
        self._runs = list(runs.runs)
        self._sources: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        self._addresses: list[int] = []

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Copies; done when it returns."""
        parts = self._sources or self._parts_of(sources)
        if self._source_stays:
            self._sources = parts
        addresses = [target.data_ptr() for target in targets]
        views = (
            self._views if addresses == self._addresses else self._views_of([_bytes_of(target) for target in targets])
        )
        if self._targets_stay:
            self._views, self._addresses = views, addresses
        if views:
            # Torch has no public name for many copies in one call, and its optimisers rely on this one.
            cast("Any", torch)._foreach_copy_(views, parts)

    def _parts_of(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        first = [int(source.storage_offset()) for source in sources]
        return [
            sources[segment].as_strided((height, width), (pitch, 1), first[segment] + source)
            for segment, source, _, _, width, height, pitch, _ in self._runs
        ]

    def _views_of(self, memory: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        return [
            memory[target][0].as_strided((height, width), (pitch, 1), memory[target][1] + offset)
            for _, _, target, offset, width, height, _, pitch in self._runs
        ]


def _bytes_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor's memory as 1-D uint8, and where in it the tensor begins."""
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=_HERE).set_(cast("Any", storage))
    return memory, tensor.data_ptr() - memory.data_ptr()
