"""What several ranks hold alike is the same on all of them: checksums of their copies are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from checkpoint_engine.catalog import Catalog, TensorEntry
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DuplicateTensorError
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.planning.copies import Copied, box_of_entry, copied_boxes
from checkpoint_engine.reload.proof import Checksums
from checkpoint_engine.source.store import HeldSegment, Registered

__all__ = ["CopyCheck"]


class CopyCheck:
    """Remembers which boxes of the latest catalog have several holders."""

    def __init__(self) -> None:
        self._checksums = Checksums()
        self._known: tuple[Catalog, Mapping[Copied, tuple[int, ...]]] | None = None

    def copied(self, catalog: Catalog) -> Mapping[Copied, tuple[int, ...]]:
        """The ranks of each box that several hold."""
        if self._known is None or self._known[0] is not catalog:
            self._known = catalog, copied_boxes(catalog)
        return self._known[1]

    def sums_of(self, catalog: Catalog, registered: Registered | None, deadline: Deadline) -> list[int]:
        """Checksums of this rank's copies, in the order in which `copied` has those that it holds.

        Raises:
            CheckpointStateError: a tensor that was registered in place is gone.
            DeadlineError: what is on its way into this rank's memory does not come in time.
        """
        copied, found = self.copied(catalog), dict[Copied, torch.Tensor]()
        if registered is None:
            return []
        for tensor, value in _values(registered, deadline):
            if (box := box_of_entry(tensor)) in copied:
                found[box] = self._checksums.of(value())
        if not found:
            return []
        return cast(
            "list[int]", cast("Any", torch.stack([found[box].cpu() for box in copied if box in found])).tolist()
        )

    def compare(self, catalog: Catalog, sums: Sequence[Sequence[int]]) -> None:
        """Takes what `sums_of` gave on every rank.

        Raises:
            DuplicateTensorError: two ranks hold other bytes under one name.
        """
        left = [iter(each) for each in sums]
        for (name, begin), ranks in self.copied(catalog).items():
            first, *others = ((rank, next(left[rank], None)) for rank in ranks)
            for rank, found in others:
                if found != first[1]:
                    where = f" (the shard at {list(begin)})" if any(begin) else ""
                    raise DuplicateTensorError(
                        f"tensor {name!r}{where} is registered on rank {first[0]} and again on rank {rank}, with other "
                        "bytes; make copies equal in the trainer, or register the tensor on one rank only"
                    )


def _values(registered: Registered, deadline: Deadline) -> Iterator[tuple[TensorEntry, Callable[[], torch.Tensor]]]:
    """What gives each tensor's value, or its bytes: out of what it is filled from, or else where it lies."""
    tensors = (tensor for entry in registered.entries for tensor in entry.tensors)
    refill = registered.refill
    if refill is not None and refill.sources is not None:
        yield from zip(tensors, (partial(_plain, source) for source in refill.sources), strict=True)
        return
    if refill is not None:
        refill.wait_for_all(lambda: deadline.check("filling the memory of this rank"))
    for number, (segment, entry) in enumerate(zip(registered.segments, registered.entries, strict=True)):
        segment.check()
        for tensor in entry.tensors:
            yield tensor, partial(_bytes, segment, number, tensor)


def _plain(source: torch.Tensor) -> torch.Tensor:
    return source.detach().resolve_conj().resolve_neg()


def _bytes(segment: HeldSegment, number: int, tensor: TensorEntry) -> torch.Tensor:
    return segment.bytes_of(_alone(number, tensor))[: tensor.nbytes]


def _alone(segment: int, tensor: TensorEntry) -> Bucket:
    return Bucket(0, segment, tensor.offset, tensor.nbytes, (tensor,))
