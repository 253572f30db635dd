"""The buckets that come with vLLM's calls, by layout: trainers send the same ones again in every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine.sdk import TensorSpec
from checkpoint_engine.sdk.deliveries import BucketLayout, Delivery, TensorSlice, torch_dtype, view_bucket

__all__ = ["Brought", "BucketLayouts", "Described"]

Described = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each tensor."""


@dataclass(frozen=True)
class Brought:
    """What one call brings."""

    specs: Mapping[str, TensorSpec]
    """What each tensor is; the very same object whenever the same ones come."""
    tensors: Delivery


@dataclass(frozen=True)
class _Known:
    layout: BucketLayout
    specs: Mapping[str, TensorSpec]


class BucketLayouts:
    """Keeps those of the last update and of the one under way, and what sinks have worked out for them."""

    def __init__(self) -> None:
        self._last: dict[Hashable, _Known] = {}
        self._now: dict[Hashable, _Known] = {}

    def packed(self, memory: torch.Tensor, described: Described, sizes: tuple[int, ...]) -> Brought:
        """Tensors that lie one after the other in memory (1-D uint8).

        Raises:
            ValueError: a size is another than dtype and shape say, or the memory is too short.
        """
        known = self._known((described, sizes), described, lambda: _packed(described, sizes))
        if not known.layout.fits(0, memory.numel()):
            raise ValueError(f"tensors of {known.layout.nbytes} bytes are said to lie in a buffer of {memory.numel()}")
        return Brought(known.specs, view_bucket(memory, known.layout, 0))

    def apart(self, described: Described, tensors: Sequence[torch.Tensor]) -> Brought:
        """Tensors each of which has memory of its own.

        Raises:
            ValueError: one is not what is said of it.
        """
        known = self._known(described, described, lambda: BucketLayout(()))
        _check_same(known.specs, tensors)
        whole = [tensor.contiguous() for tensor in tensors]
        pairs = tuple(zip(known.specs, whole, strict=True))
        delivery = Delivery(
            tuple(known.specs),
            sum(tensor.nbytes for tensor in whole),
            lambda: pairs,
            tuple(tensor.reshape(-1).view(torch.uint8) for tensor in whole if tensor.numel()),
            bucket=known.layout,
        )
        return Brought(known.specs, delivery)

    def end_of_update(self) -> None:
        """Forgets layouts that did not come in it."""
        if self._now:
            self._last, self._now = self._now, {}

    def _known(self, key: Hashable, described: Described, make: Callable[[], BucketLayout]) -> _Known:
        known = self._now.get(key) or self._last.get(key)
        if known is None:
            specs = {name: TensorSpec(torch_dtype(dtype), shape) for name, dtype, shape in described}
            known = _Known(make(), specs)
        self._now[key] = known
        return known


def _packed(described: Described, sizes: tuple[int, ...]) -> BucketLayout:
    slices: list[TensorSlice] = []
    at = 0
    for (name, dtype, shape), nbytes in zip(described, sizes, strict=True):
        if nbytes != math.prod(shape) * torch_dtype(dtype).itemsize:
            raise ValueError(f"tensor {name!r} is said to take {nbytes} bytes, which {dtype} {shape} does not")
        slices.append(TensorSlice(name, dtype, shape, at))
        at += nbytes
    return BucketLayout(slices)


def _check_same(specs: Mapping[str, TensorSpec], tensors: Sequence[torch.Tensor]) -> None:
    for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(
                f"tensor {name!r} is said to be {spec.dtype} {spec.shape}, its handle is of {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
