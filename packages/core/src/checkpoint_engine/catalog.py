"""The catalog: who holds which tensor, in which segment, at which offset.

It is what ranks tell each other before an update, and what is saved as JSON for replicas that join later.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from checkpoint_engine.dtypes import item_size
from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError

SCHEMA_VERSION = 1
CONTENT_MODULUS = 1 << 128


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor and where it lies: row-major, `offset` bytes into its segment."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * item_size(self.dtype)

    def moved(self, distance: int) -> TensorEntry:
        """The same tensor so many bytes further on."""
        return TensorEntry(self.name, self.dtype, self.shape, self.offset + distance)


class SegmentEntry(msgspec.Struct, frozen=True):
    """One block of host memory. `tensors` are in ascending order of offset and do not overlap."""

    nbytes: int
    tensors: tuple[TensorEntry, ...]
    address: int = 0
    """Where the owner has it mapped; of use to transports that read remote memory."""


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


class Catalog(msgspec.Struct, frozen=True):
    """All that is known of one checkpoint, by holders in ascending order of rank."""

    name: str
    holdings: tuple[Holding, ...]
    schema: int = SCHEMA_VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def content(self) -> str:
        """A digest of samples of the bytes of all tensors, whoever holds them; empty if a holder did not make one."""
        parts = [holding.content for holding in self.holdings if any(True for s in holding.segments if s.tensors)]
        if not all(parts):
            return ""
        return f"{sum(int(part, 16) for part in parts) % CONTENT_MODULUS:032x}"

    def tensors(self) -> Iterator[TensorEntry]:
        """Every tensor, holder by holder."""
        for holding in self.holdings:
            for segment in holding.segments:
                yield from segment.tensors

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes and shapes, whoever holds them: equal for checkpoints that are interchangeable."""
        digest = hashlib.sha256()
        for entry in sorted((t.name, t.dtype, t.shape) for t in self.tensors()):
            digest.update(repr(entry).encode())
        return digest.hexdigest()

    def validate(self) -> Catalog:
        """Returns the catalog itself if it is sound.

        Raises:
            DuplicateTensorError: two ranks, or one rank twice, hold a tensor of the same name.
            CheckpointFormatError: tensors overlap, leave their segment, or a field has an impossible value.
        """
        if self.schema != SCHEMA_VERSION:
            raise CheckpointFormatError(
                f"catalog of {self.name!r} has schema {self.schema}, this version reads {SCHEMA_VERSION}"
            )
        owner_of: dict[str, int] = {}
        for holding in self.holdings:
            for segment in holding.segments:
                _check_segment(holding.rank, segment)
                for tensor in segment.tensors:
                    if tensor.name in owner_of:
                        raise DuplicateTensorError(
                            f"tensor {tensor.name!r} is registered on rank {owner_of[tensor.name]} and again on "
                            f"rank {holding.rank}; give each tensor to one rank only"
                        )
                    owner_of[tensor.name] = holding.rank
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


def _check_segment(rank: int, segment: SegmentEntry) -> None:
    end = 0
    if segment.nbytes < 0 or segment.address < 0:
        raise CheckpointFormatError(f"a segment on rank {rank} has {segment.nbytes} bytes at {segment.address}")
    for tensor in segment.tensors:
        if any(size < 0 for size in tensor.shape):
            raise CheckpointFormatError(f"tensor {tensor.name!r} on rank {rank} has the shape {tensor.shape}")
        if tensor.offset < end or tensor.offset + tensor.nbytes > segment.nbytes:
            raise CheckpointFormatError(
                f"tensor {tensor.name!r} on rank {rank} occupies bytes {tensor.offset} to "
                f"{tensor.offset + tensor.nbytes} of a segment of {segment.nbytes}, of which {end} are taken before it"
            )
        end = tensor.offset + tensor.nbytes
