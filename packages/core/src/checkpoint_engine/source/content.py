"""A short description of a checkpoint's bytes, cheap enough to make every time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from checkpoint_engine.catalog import CONTENT_MODULUS, SegmentEntry, TensorEntry
from checkpoint_engine.source.segment import Segment

__all__ = ["content_of"]

_SAMPLE = 512
"""Bytes taken from the beginning, the middle and the end of every tensor."""


def content_of(segments: Sequence[Segment], entries: Sequence[SegmentEntry]) -> str:
    """128 bits over samples of all tensors, in hexadecimal.

    A sum over tensors, so that `Catalog.content` can add up what ranks hold: it depends neither on their order nor on
    the segments that they lie in. Equal checkpoints have equal sums; two training steps differ in some sample.
    """
    total = 0
    for segment, entry in zip(segments, entries, strict=True):
        for tensor in entry.tensors:
            total += int.from_bytes(_digest(segment, tensor), "little")
    return f"{total % CONTENT_MODULUS:032x}"


def _digest(segment: Segment, tensor: TensorEntry) -> bytes:
    digest = hashlib.blake2b(repr((tensor.name, tensor.dtype, tensor.shape)).encode(), digest_size=16)
    end = tensor.offset + tensor.nbytes
    middle = tensor.offset + max(0, tensor.nbytes - _SAMPLE) // 2
    for start in sorted({tensor.offset, middle, max(tensor.offset, end - _SAMPLE)}):
        digest.update(segment.read(start, min(start + _SAMPLE, end)))
    return digest.digest()
