"""What `ParameterServer.get_metas` returns: who holds which tensor, in the shape that existing callers know.

Inside, a `Catalog` says the same. These classes are plain dataclasses: they pickle for callers who pickle, and
pydantic (`TypeAdapter`, FastAPI) reads and writes them as JSON with dtypes such as `"torch.bfloat16"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import torch
from typing_extensions import Self

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.dtypes import dtype_name, torch_dtype
from checkpoint_engine.errors import (
    CheckpointFormatError,
    CheckpointStateError,
    DuplicateTensorError,
    UnsupportedTensorError,
)
from checkpoint_engine.planning.copies import choose_holders, copied_boxes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "BucketRange",
    "DataToGather",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "ParameterMeta",
    "catalog_to_metas",
    "metas_from_json",
    "metas_to_catalog",
    "metas_to_json",
]

_DTYPE_PREFIX = "torch."
_NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec makes of bytes that are damaged."""


def _dtype(value: object) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    if not isinstance(value, str) or not value.startswith(_DTYPE_PREFIX):
        raise UnsupportedTensorError(f"{value!r} is no dtype; write it as 'torch.bfloat16'")
    return torch_dtype(value.removeprefix(_DTYPE_PREFIX))


def _shape(value: Sequence[int]) -> torch.Size:
    if not isinstance(value, (list, tuple)) or any(type(size) is not int or not 0 <= size < 1 << 63 for size in value):
        raise CheckpointFormatError(f"a shape of {value!r} is impossible")
    return torch.Size(value)


class _DtypeAsText:
    """Tells pydantic how a torch.dtype is read and written. Only pydantic calls this, so only then it is imported."""

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> Any:  # noqa: ANN401 - pydantic's
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.no_info_before_validator_function(
            _dtype,
            core_schema.is_instance_schema(torch.dtype),
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema()),
        )

    def __get_pydantic_json_schema__(self, schema: object, handler: object) -> dict[str, Any]:
        return {"type": "string", "examples": ["torch.bfloat16"]}


class _ShapeAsList:
    """The same for torch.Size."""

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> Any:  # noqa: ANN401 - pydantic's
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.no_info_after_validator_function(
            _shape,
            core_schema.list_schema(core_schema.int_schema()),
            serialization=core_schema.plain_serializer_function_ser_schema(
                list, return_schema=core_schema.list_schema(core_schema.int_schema())
            ),
        )

    def __get_pydantic_json_schema__(self, schema: object, handler: object) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "examples": [[4096, 1024]]}


class _Model:
    """What callers of pydantic's models use of them. Dtypes are text there, and shapes lists."""

    def model_dump(self) -> dict[str, Any]:
        """Plain data."""
        return msgspec.to_builtins(self, enc_hook=_to_plain)

    def model_dump_json(self) -> str:
        """The same as JSON."""
        return msgspec.json.encode(self, enc_hook=_to_plain).decode()

    @classmethod
    def model_validate(cls, obj: object) -> Self:
        """Reads what `model_dump` gave.

        Raises:
            CheckpointFormatError: it is something else.
        """
        try:
            return obj if isinstance(obj, cls) else msgspec.convert(obj, cls, dec_hook=_from_plain)
        except msgspec.MsgspecError as error:
            raise CheckpointFormatError(f"no {cls.__name__}: {error}") from error

    @classmethod
    def model_validate_json(cls, data: str | bytes) -> Self:
        """Reads what `model_dump_json` gave.

        Raises:
            CheckpointFormatError: it is something else.
        """
        try:
            return msgspec.json.decode(data, type=cls, dec_hook=_from_plain)
        except _NOT_JSON as error:
            raise CheckpointFormatError(f"no {cls.__name__}: {error}") from error


@dataclass
class ParameterMeta(_Model):
    """One tensor. `aligned_size` bytes after its beginning the next one of the buffer begins."""

    name: str
    dtype: Annotated[torch.dtype, _DtypeAsText()]
    shape: Annotated[torch.Size, _ShapeAsList()]
    aligned_size: int

    def __post_init__(self) -> None:
        """Takes dtypes as text and shapes as lists, too."""
        self.dtype, self.shape = _dtype(self.dtype), _shape(self.shape)


class BucketRange(NamedTuple):
    """Bytes `offset` to `offset + size` of memory buffer `idx`."""

    idx: int
    offset: int
    size: int


@dataclass
class H2DBucket(_Model):
    """Ranges of memory buffers that travel together, and the tensors in them."""

    size: int
    ranges: list[BucketRange]
    items: list[ParameterMeta]


@dataclass
class MemoryBufferMetas(_Model):
    """A block of host memory: tensors one after another from address `ptr` on, `size` bytes in all."""

    metas: list[ParameterMeta]
    ptr: int
    size: int


@dataclass
class MemoryBuffer:
    """A block of host memory itself, as 1-D uint8."""

    buffer: torch.Tensor
    size: int
    metas: list[ParameterMeta]
    manually_pinned: bool = False


@dataclass
class MemoryBufferMetaList(_Model):
    """All that one rank holds of a checkpoint, where a P2P transport finds it, and what a reader must find there.

    All fields stand in this class: `TypeAdapter(dict[int, MemoryBufferMetaList])`, by which update scripts write metas
    to a file, leaves out whatever a subclass adds.
    """

    p2p_store_addr: str | None
    memory_buffer_metas_list: list[MemoryBufferMetas]
    rdma_device: str
    host_ip: str = ""
    device_uuid: str = ""
    checkpoint: str = ""
    transport: str = ""
    control_address: int = 0
    generation: int = 0
    content: str = ""
    settling: float = 0.0


@dataclass
class DataToGather(MemoryBufferMetaList):
    """The same, under the name by which scripts know what a rank tells the others."""


def catalog_to_metas(catalog: Catalog) -> dict[int, MemoryBufferMetaList]:
    """What each rank holds, by rank; ranks that hold nothing are left out, as are copies of what another holds.

    Raises:
        CheckpointStateError: a tensor is held in shards, of which this form knows nothing.
    """
    cut = next((tensor for tensor in catalog.tensors() if tensor.shard is not None), None)
    if cut is not None:
        raise CheckpointStateError(
            f"tensor {cut.name!r} of {catalog.name!r} is held in shards, which upstream's metas cannot say; pass on "
            "the catalog (ParameterServer.catalog, load_catalogs), or register whole tensors"
        )
    each_once = choose_holders(catalog)
    return {
        holding.rank: MemoryBufferMetaList(
            p2p_store_addr=holding.p2p_address,
            memory_buffer_metas_list=[_buffer_of(segment) for segment in holding.segments if segment.tensors],
            rdma_device=holding.rdma_device,
            host_ip=holding.host,
            device_uuid=holding.device,
            checkpoint=catalog.name,
            transport=holding.transport,
            control_address=holding.control_address,
            generation=holding.generation,
            content=holding.content if each_once is catalog else "",
            settling=holding.settling,
        )
        for holding in each_once.holdings
        if any(segment.tensors for segment in holding.segments)
    }


def metas_to_catalog(metas: Mapping[int, MemoryBufferMetaList], name: str = "") -> Catalog:
    """The catalog that says the same; it has the given name, or else the one in the metas if they know it.

    Raises:
        CheckpointFormatError: sizes contradict each other.
        DuplicateTensorError: two ranks hold a tensor of the same name.
        UnsupportedTensorError: a tensor has a dtype that cannot be carried.
    """
    holdings = tuple(
        Holding(
            rank=rank,
            host=metas[rank].host_ip,
            device=metas[rank].device_uuid,
            segments=tuple(_segment_of(buffer) for buffer in metas[rank].memory_buffer_metas_list),
            p2p_address=metas[rank].p2p_store_addr,
            rdma_device=metas[rank].rdma_device,
            transport=metas[rank].transport,
            control_address=metas[rank].control_address,
            generation=metas[rank].generation,
            content=metas[rank].content,
            settling=metas[rank].settling,
        )
        for rank in sorted(metas)
    )
    known = {metas[rank].checkpoint for rank in metas}
    catalog = Catalog(name=name or (known.pop() if len(known) == 1 else ""), holdings=holdings).validate()
    for (tensor, _), ranks in copied_boxes(catalog).items():  # nobody has compared them
        raise DuplicateTensorError(f"tensor {tensor!r} is registered on rank {ranks[0]} and again on rank {ranks[1]}")
    return catalog


def metas_to_json(metas: Mapping[int, MemoryBufferMetaList]) -> bytes:
    """The same JSON that pydantic and `GET /v1/metas` make of it."""
    return msgspec.json.encode({str(rank): held for rank, held in metas.items()}, enc_hook=_to_plain)


def metas_from_json(data: bytes, source: str = "metas") -> dict[int, MemoryBufferMetaList]:
    """Reads what `metas_to_json`, pydantic or `GET /v1/metas` wrote.

    Raises:
        CheckpointFormatError: not JSON, or not metas.
    """
    try:
        return msgspec.json.decode(data, type=dict[int, MemoryBufferMetaList], dec_hook=_from_plain)
    except _NOT_JSON as error:
        raise CheckpointFormatError(f"{source} holds no metas: {error}") from error


def _to_plain(value: object) -> object:
    if isinstance(value, torch.dtype):
        return str(value)
    raise NotImplementedError


def _from_plain(kind: type, value: Any) -> object:  # noqa: ANN401 - whatever JSON holds
    if kind is torch.dtype:
        return _dtype(value)
    if kind is torch.Size:
        return _shape(value)
    raise NotImplementedError


def _buffer_of(segment: SegmentEntry) -> MemoryBufferMetas:
    start = segment.tensors[0].offset
    ends = [tensor.offset for tensor in segment.tensors[1:]] + [segment.nbytes]
    metas = [
        ParameterMeta(
            name=tensor.name,
            dtype=torch_dtype(tensor.dtype),
            shape=torch.Size(tensor.shape),
            aligned_size=end - tensor.offset,
        )
        for tensor, end in zip(segment.tensors, ends, strict=True)
    ]
    # A buffer of this kind begins with its first tensor; a segment may begin with a file's header.
    return MemoryBufferMetas(
        metas=metas, ptr=segment.address + start if segment.address else 0, size=segment.nbytes - start
    )


def _segment_of(buffer: MemoryBufferMetas) -> SegmentEntry:
    tensors: list[TensorEntry] = []
    offset = 0
    for meta in buffer.metas:
        tensors.append(TensorEntry(meta.name, dtype_name(meta.dtype), tuple(meta.shape), offset))
        offset += meta.aligned_size
    return SegmentEntry(nbytes=buffer.size, tensors=tuple(tensors), address=buffer.ptr)
