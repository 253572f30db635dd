"""The backend `checkpoint_engine_nccl`: takes what vLLM's own `nccl` trainers broadcast, packed or not."""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint_engine.sdk import CheckpointStateError, Deadline, TensorSpec, limits
from checkpoint_engine.sdk.deliveries import torch_dtype
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.transfer.layouts import Brought, BucketLayouts, Described
from checkpoint_engine_vllm.transfer.receiver import Receiver
from checkpoint_engine_vllm.transfer.trainer_group import GroupPlace, TrainerGroup, connect

__all__ = ["NcclInitInfo", "NcclReceiver", "NcclUpdateInfo"]

_ALIGNMENT = 256
_BUFFER_BYTES = 1 << 30
"""Of vLLM's trainers, unless they say otherwise."""


@dataclass
class NcclInitInfo:
    """Of a connection, in the fields of vLLM 0.25 to 0.33."""

    rank_offset: int
    """Of the first worker, in a group whose rank 0 is the trainer."""
    world_size: int
    master_address: str | None = None
    master_port: int | None = None
    nccl_unique_id_b64: str | None = None
    packed: bool | None = None
    """Said here from 0.28 on."""
    packed_buffer_size_bytes: int | None = None
    packed_num_buffers: int = 2
    """Of the trainer's; here there is one."""

    def place(self, worker: int) -> GroupPlace:
        """That of a worker, counted over all replicas.

        Raises:
            ValueError: it is not said where the group meets.
        """
        rank = self.rank_offset + worker
        if self.nccl_unique_id_b64:
            return GroupPlace(rank, self.world_size, unique_id=_unique_id(self.nccl_unique_id_b64))
        if self.master_address is None or self.master_port is None:
            raise ValueError("give `master_address` and `master_port`, or `nccl_unique_id_b64`")
        return GroupPlace(rank, self.world_size, self.master_address, self.master_port)


@dataclass
class NcclUpdateInfo:
    """One call of an update, in the fields of vLLM 0.25 to 0.33."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    packed: bool | None = None
    """Said here up to 0.25."""
    packed_buffer_size_bytes: int | None = None
    packed_num_buffers: int | None = None

    def __post_init__(self) -> None:
        """Checks that the lists belong together.

        Raises:
            ValueError: they do not.
        """
        for field in ("dtype_names", "shapes"):
            if len(getattr(self, field)) != len(self.names):
                raise ValueError(f"`{field}` is no list with an entry for each of `names`")
        if len(set(self.names)) < len(self.names):
            raise ValueError("`names` has a name twice")

    def described(self) -> Described:
        """Name, dtype and shape of each tensor."""
        return tuple(zip(self.names, self.dtype_names, map(tuple, self.shapes), strict=True))


class NcclReceiver(Receiver):
    """The backend `checkpoint_engine_nccl`."""

    door = "checkpoint_engine_nccl"
    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self._device = compat.device_of(self.worker)
        self._group: TrainerGroup | None = None
        self._init = NcclInitInfo(0, 0)
        self._layouts = BucketLayouts()
        self._memory = self._new_memory(0)

    def init_transfer_engine(self, init_info: NcclInitInfo) -> None:
        """Meets the trainer; one that was met before is left.

        Raises:
            CheckpointEngineError: it does not come.
        """
        self.shutdown()
        self._init = init_info
        self._group = connect(init_info.place(self._number()), self._device)

    def receive_weights(self, update_info: NcclUpdateInfo) -> None:
        """Takes over what one call brings.

        A trainer cannot be told to stop: what it still sends of an update that was refused is received and dropped, so
        that it gets to hear why, and the group is in step for the next one.

        Raises:
            CheckpointStateError: no trainer was met.
            CheckpointEngineError: it does not fit, or did not come.
        """
        group, failures = self._group, list[Exception]()
        if group is None:
            raise CheckpointStateError("no trainer is connected: init_weight_transfer_engine comes first")
        packed = self._said("packed", update_info) or False
        size = self._said("packed_buffer_size_bytes", update_info) or _BUFFER_BYTES
        described, deadline = update_info.described(), Deadline(limits.UPDATE)
        with _noting(failures):
            self.announce({name: TensorSpec(torch_dtype(dtype), shape) for name, dtype, shape in described})
        for chunk in _chunks(described, size):
            tensors = self._places(chunk, packed=packed)
            group.receive(tensors, deadline)
            if not failures:
                with _noting(failures):
                    self.take(self._brought(chunk, tensors, packed=packed))
        if failures:
            raise failures[0]

    def close_memory(self) -> None:
        """Frees what updates arrive in."""
        self._memory = self._new_memory(0)
        self._layouts.end_of_update()

    def shutdown(self) -> None:
        """Gives up what is under way, and leaves the trainer's group."""
        super().shutdown()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    # -- inside

    def _said(self, what: str, update_info: NcclUpdateInfo) -> Any:  # noqa: ANN401 - the type of the field
        """By the update, the connection, or in 0.26 vLLM's configuration, if code made it: its options cannot."""
        said = (getattr(where, what, None) for where in (update_info, self._init, self.config))
        return next((value for value in said if value is not None), None)

    def _number(self) -> int:
        """This worker's, over all replicas."""
        parallel: Any = self.worker.vllm_config.parallel_config
        return int(parallel.data_parallel_index) * int(parallel.world_size) + int(self.worker.rank)

    def _places(self, chunk: Described, *, packed: bool) -> list[torch.Tensor]:
        """Where a chunk arrives: in one piece, or each tensor by itself."""
        sizes = [_nbytes(dtype, shape) for _, dtype, shape in chunk]
        if packed:
            return [self._room(sum(sizes))]
        ends = list(itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
        room = self._room(ends[-1])
        begins = [0, *ends[:-1]]
        return [
            room[begin : begin + size].view(torch_dtype(dtype)).view(shape)
            for begin, size, (_, dtype, shape) in zip(begins, sizes, chunk, strict=True)
        ]

    def _brought(self, chunk: Described, tensors: list[torch.Tensor], *, packed: bool) -> Brought:
        if packed:
            return self._layouts.packed(tensors[0], chunk, tuple(_nbytes(dtype, shape) for _, dtype, shape in chunk))
        return self._layouts.apart(chunk, tensors)

    def _room(self, size: int) -> torch.Tensor:
        if self._memory.numel() < size:
            self._memory = self._new_memory(size)
        return self._memory[:size]

    def _new_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _chunks(described: Described, size: int) -> Iterator[Described]:
    """As vLLM's trainers cut: the tensor that takes a chunk over `size` bytes is its last."""
    first = filled = 0
    for number, (_, dtype, shape) in enumerate(described):
        filled += _nbytes(dtype, shape)
        if filled > size:
            yield described[first : number + 1]
            first, filled = number + 1, 0
    if described[first:]:
        yield described[first:]


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * torch_dtype(dtype).itemsize


@contextlib.contextmanager
def _noting(failures: list[Exception]) -> Generator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised once the trainer has sent everything
        failures.append(error)


def _unique_id(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"`nccl_unique_id_b64` is no base64: {error}") from error
