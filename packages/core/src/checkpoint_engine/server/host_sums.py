"""Checksums of what lies in host memory, by which a bit that flips there after it was registered is noticed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from msgspec.structs import replace

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.errors import CheckpointFormatError
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import Registered
from checkpoint_engine.source.word_sums import sum_of_words

__all__ = ["HostSums"]


class HostSums:
    """Those of all tensors of one checkpoint as they were when it was registered; device memory is not looked at."""

    def __init__(self, registered: Registered) -> None:
        """Takes them."""
        self._registered = registered
        self._sums = self._of_all()

    def entries(self) -> list[SegmentEntry]:
        """What describes the segments, with the sums: whoever reads them from elsewhere compares."""
        sums = map(int, self._sums)
        pairs = zip(self._registered.segments, self._registered.entries, strict=True)
        return [
            replace(entry, tensors=tuple(replace(tensor, checksum=next(sums)) for tensor in entry.tensors))
            if isinstance(segment, Segment)
            else entry
            for segment, entry in pairs
        ]

    def check(self) -> None:
        """Raises unless all bytes are what they were.

        Raises:
            CheckpointFormatError: those of a tensor are not.
        """
        changed = (self._of_all() != self._sums).nonzero().flatten()
        if changed.numel():
            labels = [tensor.label for _, _, tensor in self._tensors()]
            first, more = labels[int(changed[0])], changed.numel() - 1
            others = f" and {more} more" if more else ""
            raise CheckpointFormatError(
                f"the bytes of tensor {first!r}{others} in host memory are not those that were registered as "
                f"{self._registered.name!r}: memory is faulty, or somebody has written there; unregister the "
                "checkpoint and register it again"
            )

    def _of_all(self) -> torch.Tensor:
        sums = [
            sum_of_words(segment.bytes_of(Bucket(0, number, tensor.offset, tensor.nbytes, (tensor,))))
            for number, segment, tensor in self._tensors()
        ]
        return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)

    def _tensors(self) -> Iterator[tuple[int, Segment, TensorEntry]]:
        pairs = zip(self._registered.segments, self._registered.entries, strict=True)
        for number, (segment, entry) in enumerate(pairs):
            if isinstance(segment, Segment):
                for tensor in entry.tensors:
                    yield number, segment, tensor
