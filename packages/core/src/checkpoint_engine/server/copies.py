"""What several ranks hold alike is the same on all of them: checksums of their copies are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.catalog import Catalog, TensorEntry
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DuplicateTensorError
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.planning.copies import Copied, box_of_entry, copied_boxes
from checkpoint_engine.reload.proof import Checksums
from checkpoint_engine.source.store import Registered

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
        if registered.refill is not None:
            registered.refill.wait_for_all(lambda: deadline.check("filling the memory of this rank"))
        for number, (segment, entry) in enumerate(zip(registered.segments, registered.entries, strict=True)):
            segment.check()
            for tensor in entry.tensors:
                if (box := box_of_entry(tensor)) in copied:
                    held = segment.bytes_of(_alone(number, tensor))
                    found[box] = self._checksums.of(held[: tensor.nbytes])
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


def _alone(segment: int, tensor: TensorEntry) -> Bucket:
    return Bucket(0, segment, tensor.offset, tensor.nbytes, (tensor,))
