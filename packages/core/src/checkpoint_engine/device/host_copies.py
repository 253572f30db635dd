"""Copies from host memory to a GPU, straight into slices of tensors that lie there.

Torch copies rows that are apart at a few GB/s, row by row through a buffer of its own. The driver's own copy of rows
reads pinned memory at nearly the rate of the bus.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch


class Rows(NamedTuple):
    """`height` rows of `width` bytes, `target_pitch` and `source_pitch` bytes apart."""

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


def copy_from_host(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies on the target's current stream; returns before it is done if the source is pinned."""
    rows = rows_of(target, source) if target.dtype == source.dtype else None
    if rows is None:
        target.copy_(source.to(target.device, non_blocking=True))
    elif target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=True)
    else:
        _copy_rows(target.device, rows)


def rows_of(target: torch.Tensor, source: torch.Tensor) -> Iterator[Rows] | None:
    """The rows that make up a copy between tensors of one shape and dtype; None if their elements are apart."""
    item = target.dtype.itemsize
    dimensions = [
        (size, to * item, of * item)
        for size, to, of in zip(target.shape, target.stride(), source.stride(), strict=True)
        if size != 1
    ]
    if not target.numel():
        return iter(())
    if not target.dim() or target.shape[-1] == 1:
        dimensions.append((1, item, item))  # columns are rows of a single element
    merged = _merge(dimensions)
    width, to, of = merged.pop()
    if (to, of) != (item, item):
        return None
    return _all_rows(target.data_ptr(), source.data_ptr(), width * item, merged)


def _merge(dimensions: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Makes one of neighbouring dimensions that lie without a gap on both sides."""
    merged: list[tuple[int, int, int]] = []
    for size, to, of in dimensions:
        if merged and merged[-1][1:] == (size * to, size * of):
            merged[-1] = (merged[-1][0] * size, to, of)
        else:
            merged.append((size, to, of))
    return merged


def _all_rows(target: int, source: int, width: int, outer: list[tuple[int, int, int]]) -> Iterator[Rows]:
    height, to, of = outer.pop() if outer else (1, width, width)
    if to < width or of < width:  # rows that overlap, such as those of an expanded tensor: one by one
        outer.append((height, to, of))
        height, to, of = 1, width, width
    for place in itertools.product(*(range(size) for size, _, _ in outer)):
        yield Rows(
            target + sum(index * step for index, (_, step, _) in zip(place, outer, strict=True)),
            to,
            source + sum(index * step for index, (_, _, step) in zip(place, outer, strict=True)),
            of,
            width,
            height,
        )


def _copy_rows(device: torch.device, rows: Iterator[Rows]) -> None:
    from checkpoint_engine.device.cuda import check, load_runtime  # noqa: PLC0415 - not needed without a GPU

    runtime: Any = load_runtime()
    stream = torch.cuda.current_stream(device).cuda_stream
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    for piece in rows:
        check(
            runtime,
            runtime.cudaMemcpy2DAsync(
                piece.target,
                piece.target_pitch,
                piece.source,
                piece.source_pitch,
                piece.width,
                piece.height,
                kind,
                stream,
            ),
            "copying rows to the GPU",
        )
