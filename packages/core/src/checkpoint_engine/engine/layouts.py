"""The layouts of buckets that this process has been told of: the next update mostly brings the same tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import LinkError
from checkpoint_engine.link.messages import Begin, TensorSlice, decode_buckets, name_of_layout

_MOST = 2
"""Layouts that are kept: of a model and, where its checkpoints come apart, of another."""


class Bucket:
    """The tensors of a bucket, wherever it lies; the very same object in every update of its layout."""

    def __init__(self, entries: Sequence[TensorSlice]) -> None:
        """Works out what is asked for each time that it comes.

        Raises:
            LinkError: a dtype is unknown, or a size negative.
        """
        self.entries = entries
        self.names = tuple(entry.name for entry in entries)
        items = [torch_dtype(entry.dtype).itemsize for entry in entries]
        sizes = [math.prod(entry.shape) * item for entry, item in zip(entries, items, strict=True)]
        if any(size < 0 for entry in entries for size in entry.shape):
            raise LinkError("the parameter server announces a tensor of negative size")
        self.nbytes = sum(sizes)
        self.begin = min((entry.offset for entry in entries), default=0)
        self.end = max((entry.offset + size for entry, size in zip(entries, sizes, strict=True)), default=0)
        aligned = all(entry.offset % item == 0 for entry, item in zip(entries, items, strict=True))
        self.alignment = max(items, default=1) if aligned else 0
        """A bucket at a multiple of it has all tensors where their dtypes may lie; 0: there is no such place."""

    def fits(self, offset: int, nbytes: int) -> bool:
        """Whether it can lie `offset` bytes into so many bytes of memory."""
        return offset + self.begin >= 0 and offset + self.end <= nbytes


@dataclass(frozen=True)
class Layout:
    """What an update brings, and in which buckets."""

    name: str
    buckets: tuple[Bucket, ...]
    tensors: Mapping[str, TensorSpec]
    """By name; the very same object in every update of this layout."""
    nbytes: int


_kept: dict[str, Layout] = {}
_lock = threading.Lock()


def known_layouts() -> dict[str, Layout]:
    """By name, those that need not be sent again."""
    with _lock:
        return dict(_kept)


def layout_of(begin: Begin, known: Mapping[str, Layout]) -> Layout:
    """What an update announces to a worker that said it knows `known`.

    Raises:
        LinkError: it makes no sense, or refers to what is not known.
    """
    if begin.layout and begin.layout not in known:
        raise LinkError(f"the parameter server refers to layout {begin.layout}, which this worker does not know")
    name = begin.layout or name_of_layout(begin.buckets)
    layout = known.get(name) or _read(name, begin)
    with _lock:
        _kept.pop(name, None)
        _kept[name] = layout
        while len(_kept) > _MOST:
            del _kept[next(iter(_kept))]
    return layout


def _read(name: str, begin: Begin) -> Layout:
    try:
        buckets = tuple(map(Bucket, decode_buckets(begin.buckets)))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LinkError(f"the parameter server announces no buckets: {error}") from error
    entries = [entry for bucket in buckets for entry in bucket.entries]
    tensors = {entry.name: TensorSpec(torch_dtype(entry.dtype), entry.shape) for entry in entries}
    if len(tensors) < len(entries):
        raise LinkError("the parameter server announces a tensor twice")
    return Layout(name, buckets, tensors, sum(bucket.nbytes for bucket in buckets))
