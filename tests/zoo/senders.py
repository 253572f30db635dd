"""Feeds a sink as a sender would: buckets in one memory that is used again and again, in any order."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.contract.figures import details_of
from checkpoint_engine.contract.sink import TensorSpec, Update

__all__ = ["Order", "Sender"]

_ALIGNMENT = 256
_LONGEST = 1200
Pairs = list[tuple[str, torch.Tensor]]


class _Layout:
    """Stands for one way to lay tensors out in a bucket."""


@dataclass(frozen=True)
class Order:
    """How tensors are dealt out."""

    bucket_bytes: int
    seed: int | None
    """Of the shuffle; None: as they lie in the checkpoint."""


class Sender:
    """Of one worker."""

    def __init__(self, sink: Any, device: torch.device) -> None:
        self._sink, self._device = sink, device
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def send(self, tensors: dict[str, torch.Tensor], mode: Any, order: Order) -> dict[str, Any]:
        """One update, or (`verify`) a comparison; its figures, or `error` and whether the old weights are whole."""
        names = list(tensors)
        if order.seed is not None:
            random.Random(order.seed).shuffle(names)
        specs = {name: TensorSpec(tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
        sink = self._sink.verifier() if mode == "verify" else self._sink
        try:
            sink.begin(Update("id", "zoo", "v", specs, mode))
            for bucket in _buckets([(name, tensors[name]) for name in names], order.bucket_bytes):
                sink.load(self._placed(bucket))
                self._wait()
                self._scratch.fill_(0x41)
                self._wait()
            return details_of(sink.finish())
        except Exception as error:  # noqa: BLE001 - told in the table
            traceback.print_exc()
            intact = sink.abort()
            return {"error": f"{type(error).__name__}: {error}"[:_LONGEST], "intact": intact, "dirty": self._sink.dirty}

    def _placed(self, bucket: Pairs) -> Delivery:
        room = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for _, tensor in bucket)
        if self._scratch.numel() < room:
            self._scratch = torch.empty(room, dtype=torch.uint8, device=self._device)
        placed: Pairs = []
        offset = 0
        for name, tensor in bucket:
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            place = self._scratch[offset : offset + raw.numel()]
            place.copy_(raw)
            placed.append((name, place.view(tensor.dtype).view(tensor.shape)))
            offset += -(-raw.numel() // _ALIGNMENT) * _ALIGNMENT
        names, nbytes = tuple(name for name, _ in bucket), sum(tensor.nbytes for _, tensor in bucket)
        return Delivery(names, nbytes, lambda: placed, [self._scratch], bucket=_Layout())

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)


def _buckets(pairs: Pairs, size: int) -> list[Pairs]:
    result: list[Pairs] = [[]]
    filled = 0
    for name, tensor in pairs:
        if filled and filled + tensor.nbytes > size:
            result.append([])
            filled = 0
        result[-1].append((name, tensor))
        filled += tensor.nbytes
    return result
