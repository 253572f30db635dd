"""What a checkpoint holds, read from headers or from a catalog, and the plan by which it would travel."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.errors import CheckpointFormatError, SettingError
from checkpoint_engine.planning.buckets import plan_buckets
from checkpoint_engine.server.metas import parse_metas
from checkpoint_engine.settings import Settings
from checkpoint_engine.source.directory import read_directory
from checkpoint_engine.source.filling import assign_segments
from checkpoint_engine.source.loader import Selection, select, split_among_ranks
from checkpoint_engine.source.segment import Segment

__all__ = ["Contents", "DtypeShare", "LargeTensor", "Plan", "RankShare", "catalog_of_files", "read_contents"]


class DtypeShare(msgspec.Struct, frozen=True):
    """All tensors of one dtype."""

    dtype: str
    tensors: int
    nbytes: int


class LargeTensor(msgspec.Struct, frozen=True):
    """One of the largest tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class RankShare(msgspec.Struct, frozen=True):
    """What one rank holds, and the buckets in which it sends it."""

    rank: int
    tensors: int
    nbytes: int
    buckets: int


class Plan(msgspec.Struct, frozen=True):
    """How it would travel."""

    bucket_size: int
    largest_bucket: int
    buckets: int
    nbytes: int
    """With the padding between tensors."""
    ranks: list[RankShare]


class Contents(msgspec.Struct, frozen=True):
    """What is shown of a checkpoint."""

    name: str
    files: int
    left_out: list[str]
    """Files of the directory that are not sent."""
    tensors: int
    nbytes: int
    fingerprint: str
    dtypes: list[DtypeShare]
    largest: list[LargeTensor]
    plan: Plan


@dataclass(frozen=True)
class _Imagined:
    """Stands for a segment where only its size matters."""

    nbytes: int


class _ImaginedSegments:
    """Lays tensors out as registering would, without taking memory."""

    spare = 1 << 62

    def take(self, smallest: int, wanted: int, first: TensorEntry) -> Segment:
        del first
        return cast("Segment", _Imagined(max(smallest, wanted)))


def read_contents(source: Path, ranks: int | None, bucket_size: int | None, largest: int) -> Contents:
    """Reads headers or a catalog, and plans.

    Raises:
        CheckpointFormatError: there is no checkpoint, or it is broken.
        DuplicateTensorError: a tensor occurs twice.
        SettingError: the number of ranks of a catalog cannot be chosen.
    """
    if source.is_dir():
        found = read_directory(source)
        files, left_out = found.files, found.left_out
        catalog = catalog_of_files(source.resolve().name, found.select(), ranks or 1)
    else:
        files, left_out = [], []
        catalog = _catalog_of_json(source)
        if ranks is not None and ranks != len(catalog.holdings):
            raise SettingError(f"{source} is held by {len(catalog.holdings)} ranks already; leave --ranks out")
    tensors = list(catalog.wholes())
    return Contents(
        name=catalog.name,
        files=len(files),
        left_out=left_out,
        tensors=len(tensors),
        nbytes=catalog.nbytes,
        fingerprint=catalog.fingerprint(),
        dtypes=_by_dtype(tensors),
        largest=[
            LargeTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)
            for tensor in heapq.nlargest(largest, tensors, key=lambda tensor: tensor.nbytes)
        ],
        plan=_plan(catalog, bucket_size or Settings.from_environment().bucket_size),
    )


def catalog_of_files(name: str, selections: list[Selection], ranks: int) -> Catalog:
    """The catalog that so many ranks would have, had they read these tensors.

    Raises:
        CheckpointFormatError: a file has changed.
        DuplicateTensorError: two files hold the same tensor.
    """
    holdings: list[Holding] = []
    for rank, share in enumerate(split_among_ranks(selections, ranks)):
        wanted = [tensor for selection in select(share) for tensor in selection.tensors]
        holdings.append(Holding(rank, "", "", tuple(_laid_out(wanted))))
    return Catalog(name, tuple(holdings)).validate()


def _catalog_of_json(path: Path) -> Catalog:
    """A catalog, or metas in the shape that `GET /v1/metas` has; a nameless one is named after the file.

    Raises:
        CheckpointFormatError: it is neither.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {path}: {error.strerror}") from error
    catalog = parse_metas(data, str(path))
    return catalog if catalog.name else msgspec.structs.replace(catalog, name=path.stem)


def _laid_out(tensors: list[TensorEntry]) -> Iterator[SegmentEntry]:
    for placement in assign_segments(tensors, _ImaginedSegments()):
        yield SegmentEntry(placement.segment.nbytes, placement.tensors)


def _by_dtype(tensors: list[TensorEntry]) -> list[DtypeShare]:
    count: dict[str, int] = defaultdict(int)
    nbytes: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        count[tensor.dtype] += 1
        nbytes[tensor.dtype] += tensor.nbytes
    return [DtypeShare(dtype, count[dtype], nbytes[dtype]) for dtype in sorted(count, key=lambda d: -nbytes[d])]


def _plan(catalog: Catalog, bucket_size: int) -> Plan:
    plan = plan_buckets(catalog, bucket_size)
    return Plan(
        bucket_size=plan.bucket_size,
        largest_bucket=plan.largest,
        buckets=len(plan.buckets),
        nbytes=plan.nbytes,
        ranks=[
            RankShare(
                rank=holding.rank,
                tensors=sum(len(segment.tensors) for segment in holding.segments),
                nbytes=sum(tensor.nbytes for segment in holding.segments for tensor in segment.tensors),
                buckets=sum(1 for bucket in plan.buckets if bucket.owner == holding.rank),
            )
            for holding in catalog.holdings
        ],
    )
