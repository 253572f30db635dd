"""Byte runs carried out on an NVIDIA GPU: out of blocks of its memory or the host's into tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from checkpoint_engine.device.copy_calls import load_copy_calls
from checkpoint_engine.device.kernel_copies import KernelCopies
from checkpoint_engine.planning.byte_runs import ByteRuns, Run, Runs

__all__ = ["FEW_COPIES", "CudaCopies"]

FEW_COPIES = 8
"""So many at most are queued one by one: on an H100, 4 that fill 256 MiB take 0.23 ms so, and 0.28 ms as a batch."""
_HERE = torch.device("cpu")


class CudaCopies:
    """Arrays of addresses: runs in batches, rows with the driver's own copy of rows.

    Torch would copy rows that are apart at a few GB/s out of host memory, row by row through a buffer of its own.
    Inside the GPU's memory, where blocks and targets stay, runs go by kernels.
    """

    def __init__(self, runs: ByteRuns, device: torch.device, *, stay: bool = False) -> None:
        """Makes them ready; `stay` says that blocks and targets are the same every time."""
        self._device = device
        self._calls = load_copy_calls()
        flat = runs.runs.height == 1
        self._flat, self._rows = runs.runs[flat], runs.runs[~flat]
        few = len(runs) <= FEW_COPIES and not len(self._rows)
        self._few: list[Run] | None = list(self._flat) if few else None
        self._kernels = KernelCopies(self._flat) if stay and not few else None

    def start(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Queues the copies.

        Raises:
            CheckpointEngineError: the driver refuses.
        """
        bases = [target.data_ptr() for target in targets]
        origins = [source.data_ptr() for source in sources]
        with torch.cuda.device(self._device):
            if self._few is not None:
                copies = (
                    (bases[run.target] + run.offset, origins[run.segment] + run.source, run.width) for run in self._few
                )
                self._calls.copy_each(copies, torch.cuda.current_stream(self._device).cuda_stream)
            elif self._kernels is not None and all(source.device == self._device for source in sources):
                self._kernels.start(sources, targets)
                if len(self._rows):
                    self._start_batch(_as_column(bases), _as_column(origins), self._flat[:0])
            else:
                self._start_batch(_as_column(bases), _as_column(origins), self._flat)

    def _start_batch(self, bases: torch.Tensor, origins: torch.Tensor, flat: Runs) -> None:
        current, own = torch.cuda.current_stream(self._device), _own_stream(self._device)
        own.wait_stream(current)
        rows = self._rows
        self._calls.copy(
            bases[flat.target] + flat.offset, origins[flat.segment] + flat.source, flat.width, own.cuda_stream
        )
        if len(rows):
            self._calls.copy_rows(
                (bases[rows.target] + rows.offset, rows.target_pitch),
                (origins[rows.segment] + rows.source, rows.source_pitch),
                (rows.width, rows.height),
                own.cuda_stream,
            )
        current.wait_stream(own)


def _as_column(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=_HERE)


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """The default stream, which engines load on, takes no batches."""
    return torch.cuda.Stream(device)
