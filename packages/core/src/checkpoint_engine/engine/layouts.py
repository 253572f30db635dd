"""The layouts of buckets that this process has been told of: the next update mostly brings the same tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.engine.adapter import TensorSpec
from checkpoint_engine.errors import LinkError
from checkpoint_engine.link.messages import Begin, Buckets, decode_buckets, name_of_layout

_MOST = 2
"""Layouts that are kept: of a model and, where its checkpoints come apart, of another."""


@dataclass(frozen=True)
class Layout:
    """What an update brings, and in which buckets."""

    name: str
    buckets: Buckets
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
        buckets = decode_buckets(begin.buckets)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LinkError(f"the parameter server announces no buckets: {error}") from error
    entries = [entry for bucket in buckets for entry in bucket]
    tensors = {entry.name: TensorSpec(torch_dtype(entry.dtype), entry.shape) for entry in entries}
    if len(tensors) < len(entries):
        raise LinkError("the parameter server announces a tensor twice")
    nbytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in tensors.values())
    return Layout(name, buckets, tensors, nbytes)
