"""A short description of a checkpoint's bytes, cheap enough to make every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.host.segment import Segment

_SAMPLE = 512
"""Bytes taken from the beginning, the middle and the end of every tensor."""
_MODULUS = 1 << 128


def content_of(segments: Sequence[Segment], entries: Sequence[SegmentEntry]) -> str:
    """128 bits over samples of all tensors, in hexadecimal.

    A sum over tensors: it depends neither on their order nor on the segment that they lie in. Equal checkpoints have
    equal sums; two training steps differ in some sample of some tensor.
    """
    total = 0
    for segment, entry in zip(segments, entries, strict=True):
        for tensor in entry.tensors:
            total += int.from_bytes(_digest(segment, tensor), "little")
    return f"{total % _MODULUS:032x}"


def add_up(contents: Iterable[str]) -> str:
    """The content of a checkpoint from those of its parts; empty if one is unknown."""
    known = list(contents)
    if not all(known):
        return ""
    return f"{sum(int(part, 16) for part in known) % _MODULUS:032x}"


def _digest(segment: Segment, tensor: TensorEntry) -> bytes:
    digest = hashlib.blake2b(repr((tensor.name, tensor.dtype, tensor.shape)).encode(), digest_size=16)
    end = tensor.offset + tensor.nbytes
    middle = tensor.offset + max(0, tensor.nbytes - _SAMPLE) // 2
    for start in sorted({tensor.offset, middle, max(tensor.offset, end - _SAMPLE)}):
        digest.update(segment.buffer(start, min(start + _SAMPLE, end)))
    return digest.digest()
