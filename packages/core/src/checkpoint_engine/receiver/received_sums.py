"""Checksums of tensors as they lie where a worker reads them, compared with those of the ranks that sent them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from checkpoint_engine.device.imported_blocks import ImportedBlocks
from checkpoint_engine.device.segments import Part
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import WeightsRejectedError
from checkpoint_engine.link.messages import Load, TensorSlice
from checkpoint_engine.receiver.layouts import UpdateLayout
from checkpoint_engine.reload.proof import Checksums, NumberedSums

__all__ = ["ReceivedSums"]


class ReceivedSums:
    """Those of one update, taken on the worker's device. Tensors are numbered in the order of the layout."""

    def __init__(self, layout: UpdateLayout, device: torch.device) -> None:
        """Begins without any."""
        self._layout, self._device = layout, device
        self._first = [0, *accumulate(len(bucket.entries) for bucket in layout.buckets)]
        self._sums = NumberedSums(Checksums())

    def take(self, load: Load, memory: Part) -> None:
        """Those of a bucket, as it lies in memory; not of what was fetched from another host only in part."""
        if not load.again:
            self._sums.take(self._tensors(load, memory))

    def check(self, sent: Sequence[int]) -> None:
        """Compares them; waits for the device.

        Raises:
            WeightsRejectedError: a tensor is not what was sent.
        """
        names = [entry.name for bucket in self._layout.buckets for entry in bucket.entries]
        if len(sent) != len(names):
            raise WeightsRejectedError(f"checksums of {len(sent)} tensors came, of {len(names)}")
        wrong = [names[number] for number, found in self._sums.known().items() if found != sent[number]]
        if wrong:
            others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise WeightsRejectedError(
                f"tensor {wrong[0]!r}{others} did not arrive as it was sent: its checksum differs. Memory or a bus is "
                "faulty, or somebody has written there; update again, and look at the host's log if it comes again"
            )

    def _tensors(self, load: Load, memory: Part) -> Iterator[tuple[int, torch.Tensor]]:
        for number, entry in enumerate(self._layout.buckets[load.bucket].entries, self._first[load.bucket]):
            begin, nbytes = load.offset + entry.offset, _nbytes(entry)
            block = memory
            if isinstance(block, ImportedBlocks):
                block, begin = block.locate(begin, nbytes)
            yield number, block[begin : begin + nbytes].to(self._device, non_blocking=True)


def _nbytes(entry: TensorSlice) -> int:
    return math.prod(entry.shape) * torch_dtype(entry.dtype).itemsize
