"""Copies tensors out of memory, of whatever device and strides, into segments."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.device import type_of
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.source.filling import FillPiece, Placement, run_all
from checkpoint_engine.source.segment import Segment

__all__ = ["Stretch", "comes_from_a_device", "copy_into", "pieces_into", "stretches_of"]

_CHUNK = 32 << 20
"""Bytes that one thread copies in one go."""
_DOWNLOAD = 256 << 20
"""Bytes that a device is told to bring in one go, about: 5 ms, beside which telling it takes nothing."""


@dataclass(frozen=True)
class Stretch:
    """Bytes `start` to `end` of a segment, in which tensors `first` to `last - 1` lie, or a part of one."""

    first: int
    last: int
    start: int
    end: int


def comes_from_a_device(tensor: torch.Tensor) -> bool:
    """Whether another device than the CPU writes it to host memory."""
    return tensor.device.type != "cpu"


def copy_into(pool: ThreadPoolExecutor, placement: Placement, sources: Sequence[torch.Tensor]) -> None:
    """Copies each placed tensor.

    Raises:
        HostMemoryError: memory ran short.
    """
    stretches = stretches_of(placement.tensors, from_devices=all(map(comes_from_a_device, sources)))
    pieces = pieces_into(placement.segment, placement.tensors, sources, stretches)
    run_all(pool, (piece.run for piece in pieces))


def stretches_of(tensors: Sequence[TensorEntry], *, from_devices: bool) -> tuple[Stretch, ...]:
    """Divides a segment into what is brought in one go; all of it, in order."""
    most = _DOWNLOAD if from_devices else _CHUNK
    return tuple(_stretches(tensors, most))


def _stretches(tensors: Sequence[TensorEntry], most: int) -> Iterator[Stretch]:
    first = 0
    for number, tensor in enumerate(tensors):
        end = tensor.offset + tensor.nbytes
        if number > first and end - tensors[first].offset > most:
            yield _between(tensors, first, number)
            first = number
        if tensor.nbytes > most:
            for start in range(tensor.offset, end, most):
                yield Stretch(number, number + 1, start, min(end, start + most))
            first = number + 1
    if first < len(tensors):
        yield _between(tensors, first, len(tensors))


def _between(tensors: Sequence[TensorEntry], first: int, last: int) -> Stretch:
    return Stretch(first, last, tensors[first].offset, tensors[last - 1].offset + tensors[last - 1].nbytes)


def pieces_into(
    segment: Segment, tensors: Sequence[TensorEntry], sources: Sequence[torch.Tensor], stretches: Sequence[Stretch]
) -> Iterator[FillPiece]:
    """What is to be done, in order; all pieces may be done at once."""
    for stretch in stretches:
        part = slice(stretch.first, stretch.last)
        run = partial(_fill, segment, stretch, tensors[part], sources[part])
        yield FillPiece(stretch.start, stretch.end, run, comes_from_a_device(sources[stretch.first]))


def _fill(segment: Segment, stretch: Stretch, tensors: Sequence[TensorEntry], sources: Sequence[torch.Tensor]) -> None:
    segment.touch(stretch.start, stretch.end)
    downloads: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for tensor, source in zip(tensors, sources, strict=True):
        begin, end = max(stretch.start - tensor.offset, 0), min(stretch.end - tensor.offset, tensor.nbytes)
        target = segment.address + tensor.offset + begin
        if begin >= end:
            continue
        if not _is_plain(source):
            if begin == 0:  # all of it: the stretches that follow find it done
                _copy_strided(segment, tensor, source.detach())
        elif comes_from_a_device(source):
            downloads.setdefault(source.device, []).append((target, _bytes_of(source, begin, end, tensor.nbytes)))
        else:
            # Like any foreign call, it lets other threads run; and unlike copy_ it starts no threads of its own.
            ctypes.memmove(target, source.data_ptr() + begin, end - begin)
    for device, copies in downloads.items():
        type_of(device).download(device, copies)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie as they read."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _bytes_of(tensor: torch.Tensor, begin: int, end: int, nbytes: int) -> torch.Tensor:
    return tensor if end - begin == nbytes else tensor.detach().view(-1).view(torch.uint8)[begin:end]


def _copy_strided(segment: Segment, tensor: TensorEntry, source: torch.Tensor) -> None:
    target = segment.tensor[tensor.offset : tensor.offset + tensor.nbytes]
    target.view(torch_dtype(tensor.dtype)).view(tensor.shape).copy_(source)
