"""Buffers that a start with dummy weights has filled with noise, until something comes for them."""

from __future__ import annotations

import torch

from checkpoint_engine.sdk.plans import Checksums
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.protocols import Worker

__all__ = ["Noise"]


class Noise:
    """Knows a worker's. To be made before any update changes the model."""

    def __init__(self, worker: Worker) -> None:
        """Takes the checksums of what a start has made up."""
        self._worker = worker
        self._checksums = Checksums()
        self._at_start = self._sums()

    def left(self) -> list[str]:
        """Names of the buffers that hold it still."""
        if not self._at_start:
            return []
        now = self._sums()
        self._at_start = {name: made_up for name, made_up in self._at_start.items() if now.get(name) == made_up}
        return list(self._at_start)

    def _sums(self) -> dict[str, int]:
        buffers = compat.made_up_buffers(self._worker, compat.target_model(self._worker))
        return {name: int(self._checksums.of(buffer.detach())) for name, buffer in buffers.items() if _has_data(buffer)}


def _has_data(buffer: torch.Tensor) -> bool:
    return not buffer.is_meta and buffer.layout == torch.strided
