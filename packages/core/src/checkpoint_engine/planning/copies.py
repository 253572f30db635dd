"""Tensors and shards that several ranks hold alike: which ones they are, and whose is read."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from checkpoint_engine.catalog import Catalog, SegmentEntry, TensorEntry

__all__ = ["Copied", "box_of_entry", "choose_holders", "copied_boxes"]

Copied = tuple[str, tuple[int, ...]]
"""Names a box: its tensor, and where in that it begins."""


def copied_boxes(catalog: Catalog) -> Mapping[Copied, tuple[int, ...]]:
    """The ranks that hold each box that more than one holds, in ascending order."""
    holders: dict[Copied, tuple[int, ...]] = {}
    for holding in catalog.holdings:
        for segment in holding.segments:
            for tensor in segment.tensors:
                box = box_of_entry(tensor)
                holders[box] = (*holders.get(box, ()), holding.rank)
    return {box: ranks for box, ranks in holders.items() if len(ranks) > 1}


def choose_holders(catalog: Catalog) -> Catalog:
    """The same checkpoint, where each box has one holder: of several, the one that has least to send so far."""
    copied = copied_boxes(catalog)
    if not copied:
        return catalog
    load = {
        holding.rank: sum(t.nbytes for s in holding.segments for t in s.tensors if box_of_entry(t) not in copied)
        for holding in catalog.holdings
    }
    chosen: dict[Copied, int] = {}
    for holding in catalog.holdings:
        for tensor in (t for s in holding.segments for t in s.tensors):
            box = box_of_entry(tensor)
            if box in copied and box not in chosen:
                chosen[box] = min(copied[box], key=lambda rank: (load[rank], rank))
                load[chosen[box]] += tensor.nbytes
    holdings = tuple(
        msgspec.structs.replace(holding, segments=tuple(_kept(s, holding.rank, chosen) for s in holding.segments))
        for holding in catalog.holdings
    )
    return msgspec.structs.replace(catalog, holdings=holdings)


def box_of_entry(tensor: TensorEntry) -> Copied:
    """Names what an entry is of."""
    return tensor.name, (0,) * len(tensor.shape) if tensor.shard is None else tensor.shard.begin


def _kept(segment: SegmentEntry, rank: int, chosen: Mapping[Copied, int]) -> SegmentEntry:
    tensors = tuple(t for t in segment.tensors if chosen.get(box_of_entry(t), rank) == rank)
    return segment if len(tensors) == len(segment.tensors) else msgspec.structs.replace(segment, tensors=tensors)
