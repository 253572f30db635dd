"""The catalog: who holds which tensor, in which segment, at which offset.

It is what ranks tell each other before an update, and what is saved as JSON for replicas that join later.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from checkpoint_engine.boxes import TensorBox, find_box_fault
from checkpoint_engine.dtypes import item_size
from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError

__all__ = ["CONTENT_MODULUS", "SCHEMA_VERSION", "Catalog", "Holding", "SegmentEntry", "ShardPlace", "TensorEntry"]

SCHEMA_VERSION = 1
CONTENT_MODULUS = 1 << 128
_CONTENT = re.compile("[0-9a-f]{0,32}")
_LONGEST_SETTLING = 60.0


class ShardPlace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a shard lies in its tensor: the shape of the whole of it, and where in that the shard begins."""

    whole: tuple[int, ...]
    begin: tuple[int, ...]


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor and where it lies: row-major, `offset` bytes into its segment.

    Of a shard, `shape` is its own, and `shard` says of what it is one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    shard: ShardPlace | None = None
    checksum: int | None = None
    """Sum of its 64-bit words, modulo 2^64 and with a sign, where its holder has taken one."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the tensor, all of it."""
        return self.shape if self.shard is None else self.shard.whole

    @property
    def box(self) -> TensorBox:
        """The elements that it has of that."""
        return TensorBox.whole(self.shape) if self.shard is None else TensorBox(self.shard.begin, self.shape)

    @property
    def label(self) -> str:
        """Names it among all that one rank holds, shards of one tensor too."""
        return self.name if self.shard is None else f"{self.name}{self.box}"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * item_size(self.dtype)

    def moved(self, distance: int) -> TensorEntry:
        """The same tensor so many bytes further on."""
        return msgspec.structs.replace(self, offset=self.offset + distance)


class SegmentEntry(msgspec.Struct, frozen=True):
    """One block of memory. `tensors` are in ascending order of offset and do not overlap.

    In device memory, where a trainer's tensors stay where they are, two names may stand for the very same bytes.
    """

    nbytes: int
    tensors: tuple[TensorEntry, ...]
    address: int = 0
    """Where the owner has it mapped; of use to transports that read remote memory."""
    kind: Literal["host", "device"] = "host"


class Holding(msgspec.Struct, frozen=True):
    """What one rank holds, and how to reach it."""

    rank: int
    host: str
    device: str
    """Identity of the rank's device, such as `GPU-5b1c…` or `cpu:0`."""
    segments: tuple[SegmentEntry, ...]
    p2p_address: str | None = None
    """Host and port of the transfer engine; None if the memory cannot be read from outside."""
    rdma_device: str = ""
    """Network cards of the holder, separated by commas; empty for TCP."""
    transport: str = ""
    control_address: int = 0
    """Where the holder keeps `generation`, in memory, for as long as the segments stay as they are."""
    generation: int = 0
    content: str = ""
    """128 bits over samples of the tensors' bytes, in hexadecimal; empty if unknown."""
    settling: float = 0.0
    """Seconds until `generation` tells of whoever wrote to segments that are files; 0 if none is."""

    def only(self, chosen: Callable[[str], bool]) -> Holding:
        """See `Catalog.only`."""
        segments = tuple(
            msgspec.structs.replace(segment, tensors=tuple(each for each in segment.tensors if chosen(each.name)))
            for segment in self.segments
        )
        return msgspec.structs.replace(self, segments=segments)


class Catalog(msgspec.Struct, frozen=True):
    """All that is known of one checkpoint, by holders in ascending order of rank."""

    name: str
    holdings: tuple[Holding, ...]
    schema: int = SCHEMA_VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each counted once whoever holds it."""
        return sum(tensor.nbytes for tensor in self.wholes())

    @property
    def content(self) -> str:
        """A digest of samples of the bytes of all tensors, whoever holds them; empty if a holder did not make one.

        Where tensors are cut or held twice there is none: it would hang on how.
        """
        if self.is_cut:
            return ""
        parts = [holding.content for holding in self.holdings if any(True for s in holding.segments if s.tensors)]
        if not all(parts):
            return ""
        return f"{sum(int(part, 16) for part in parts) % CONTENT_MODULUS:032x}"

    @property
    def is_cut(self) -> bool:
        """Whether a tensor is held in shards, or by several ranks."""
        entries = list(self.tensors())
        return any(tensor.shard for tensor in entries) or len({tensor.name for tensor in entries}) < len(entries)

    def wholes(self) -> Iterator[TensorEntry]:
        """Every tensor once and as a whole, wherever it lies."""
        seen: set[str] = set()
        for tensor in self.tensors():
            if tensor.name not in seen:
                seen.add(tensor.name)
                whole = tensor.shard is None
                yield tensor if whole else msgspec.structs.replace(tensor, shape=tensor.whole, shard=None)

    def tensors(self) -> Iterator[TensorEntry]:
        """Every tensor or shard, holder by holder."""
        for holding in self.holdings:
            for segment in holding.segments:
                yield from segment.tensors

    def only(self, chosen: Callable[[str], bool]) -> Catalog:
        """The same with no other tensors than those whose names are chosen; holdings and segments stay."""
        return msgspec.structs.replace(self, holdings=tuple(holding.only(chosen) for holding in self.holdings))

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes and shapes, whoever holds them: equal for checkpoints that are interchangeable."""
        digest = hashlib.sha256()
        for entry in sorted((t.name, t.dtype, t.shape) for t in self.wholes()):
            digest.update(repr(entry).encode())
        return digest.hexdigest()

    def validate(self) -> Catalog:
        """Returns the catalog itself if it is sound.

        Raises:
            DuplicateTensorError: a rank holds an element of a tensor twice, or two ranks do in other boxes each.
            CheckpointFormatError: tensors overlap in memory or leave their segment, an element of a tensor is held by
                nobody, or a field has an impossible value.
        """
        if self.schema != SCHEMA_VERSION:
            raise CheckpointFormatError(
                f"catalog of {self.name!r} has schema {self.schema}, this version reads {SCHEMA_VERSION}"
            )
        held: dict[str, list[tuple[int, TensorEntry]]] = {}
        for holding in self.holdings:
            _check_holding(holding)
            for segment in holding.segments:
                _check_segment(holding.rank, segment)
                for tensor in segment.tensors:
                    held.setdefault(tensor.name, []).append((holding.rank, tensor))
        for entries in held.values():
            if len(entries) > 1 or entries[0][1].shard is not None:
                _check_boxes(entries)
        return self

    def to_json(self) -> bytes:
        """Indented JSON with a stable order of fields; the fingerprints are there for people, and to be checked."""
        saved = _Saved(self.name, self.holdings, self.schema, self.fingerprint(), self.content)
        return msgspec.json.format(msgspec.json.encode(saved), indent=1)

    @classmethod
    def from_json(cls, data: bytes, source: str = "catalog") -> Catalog:
        """Reads what `to_json` wrote.

        Raises:
            CheckpointFormatError: not JSON, not a catalog, or not the one that its fingerprint is of.
        """
        try:
            saved = msgspec.json.decode(data, type=_Saved)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointFormatError(f"{source} is not a catalog: {error}") from error
        catalog = cls(saved.name, saved.holdings, saved.schema).validate()
        if saved.fingerprint not in ("", catalog.fingerprint()):
            raise CheckpointFormatError(
                f"the fingerprint in {source} is not that of the tensors in it: it was changed or cut off; get it anew"
            )
        return catalog

    def save(self, path: Path) -> None:
        """Writes the JSON to a file."""
        path.write_bytes(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Catalog:
        """Reads a saved catalog.

        Raises:
            CheckpointFormatError: no such file, not JSON, or not a catalog.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointFormatError(f"cannot read the catalog {path}: {error.strerror}") from error
        return cls.from_json(data, source=str(path))


class _Saved(msgspec.Struct, frozen=True):
    """A catalog as it is written."""

    name: str
    holdings: tuple[Holding, ...]
    schema: int = SCHEMA_VERSION
    fingerprint: str = ""
    content: str = ""


def _check_holding(holding: Holding) -> None:
    numbers = (holding.rank, holding.control_address, holding.generation)
    if not all(0 <= number < 1 << 64 for number in numbers) or not 0 <= holding.settling < _LONGEST_SETTLING:
        raise CheckpointFormatError(f"rank {holding.rank} of the catalog has impossible numbers: {numbers}")
    if not _CONTENT.fullmatch(holding.content):
        raise CheckpointFormatError(f"the digest of rank {holding.rank}, {holding.content[:40]!r}, is none")


def _check_segment(rank: int, segment: SegmentEntry) -> None:
    start = end = 0
    if segment.nbytes < 0 or segment.address < 0:
        raise CheckpointFormatError(f"a segment on rank {rank} has {segment.nbytes} bytes at {segment.address}")
    for tensor in segment.tensors:
        if min(tensor.shape, default=0) < 0:
            raise CheckpointFormatError(f"tensor {tensor.name!r} on rank {rank} has the shape {tensor.shape}")
        first, last = tensor.offset, tensor.offset + tensor.nbytes
        again = segment.kind == "device" and (first, last) == (start, end)
        if (first < end and not again) or last > segment.nbytes:
            raise CheckpointFormatError(
                f"tensor {tensor.name!r} on rank {rank} occupies bytes {first} to {last} of a segment of "
                f"{segment.nbytes}, of which {end} are taken before it"
            )
        start, end = first, last


def _check_boxes(held: Sequence[tuple[int, TensorEntry]]) -> None:
    """Checks what ranks hold of one tensor: each element once, or the same box on several ranks."""
    first_rank, first = held[0]
    holders: dict[TensorBox, list[int]] = {}
    for rank, entry in held:
        if (entry.dtype, entry.whole) != (first.dtype, first.whole):
            raise CheckpointFormatError(
                f"tensor {first.name!r} is {first.dtype} {list(first.whole)} on rank {first_rank} and {entry.dtype} "
                f"{list(entry.whole)} on rank {rank}; a tensor has one shape and dtype on all ranks"
            )
        ranks = holders.setdefault(entry.box, [])
        if rank in ranks:
            raise DuplicateTensorError(f"tensor {entry.label!r} is registered on rank {rank} and again on rank {rank}")
        ranks.append(rank)
    boxes = tuple(holders)
    fault = find_box_fault(first.whole, boxes)
    if fault is None:
        return
    name, elements = first.name, f"{fault.box} of {list(first.whole)}"
    if fault.kind == "overlap":
        one, other = (f"rank {holders[boxes[number]][0]} as {boxes[number]}" for number in fault.numbers)
        raise DuplicateTensorError(
            f"elements {elements} of tensor {name!r} are registered on {one} and again on {other}; ranks hold the same "
            "shard or others, not parts of each other's"
        )
    if fault.kind == "outside":
        raise CheckpointFormatError(f"rank {holders[fault.box][0]} holds {elements} of tensor {name!r}: beyond its end")
    raise CheckpointFormatError(
        f"no rank has registered elements {elements} of tensor {name!r}; register them where they are, or the whole "
        "tensor on one rank"
    )
