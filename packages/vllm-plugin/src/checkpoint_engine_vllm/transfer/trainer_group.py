"""The group in which a trainer of vLLM's, as rank 0, broadcasts tensors to all workers of an engine.

NCCL on GPUs, as vLLM's own `nccl` backend has it; gloo where workers compute on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import torch

from checkpoint_engine.sdk import CheckpointEngineError, Deadline, DeadlineError, MissingDependencyError, limits

__all__ = ["GroupPlace", "TrainerGroup", "connect"]

_cuda: Any = torch.cuda
_TRAINER = 0
_LOOK = 0.0002
"""Seconds between two looks at whether NCCL is done."""


@dataclass(frozen=True)
class GroupPlace:
    """Where the group meets, and which of its ranks this worker is."""

    rank: int
    world_size: int
    host: str = ""
    port: int = 0
    unique_id: bytes | None = None
    """NCCL's own, in place of host and port."""


class TrainerGroup(Protocol):
    """One worker's end."""

    def receive(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> None:
        """Fills tensors, one broadcast each, in the trainer's order; returns once they hold its bytes.

        Raises:
            DeadlineError: the trainer did not send in time; the group is closed.
            CheckpointEngineError: the trainer is gone.
        """
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


def connect(place: GroupPlace, device: torch.device) -> TrainerGroup:
    """Joins the group; waits for all others.

    Raises:
        CheckpointEngineError: they did not come.
        MissingDependencyError: there is no NCCL here.
    """
    try:
        return _Gloo(place) if device.type == "cpu" else _Nccl(place, device)
    except (RuntimeError, OSError) as error:
        raise CheckpointEngineError(
            f"rank {place.rank} of {place.world_size} could not join the trainer's group at {place.host}:{place.port}: "
            f"{error}"
        ) from error


class _Gloo:
    def __init__(self, place: GroupPlace) -> None:
        if place.unique_id is not None:
            raise MissingDependencyError("an engine on the CPU has no NCCL: give master_address and master_port")
        join: Any = importlib.import_module("vllm.distributed.utils").stateless_init_torch_distributed_process_group
        patience = timedelta(seconds=limits.UPDATE)
        self._group: Any = join(place.host, place.port, place.rank, place.world_size, "gloo", timeout=patience)

    def receive(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> None:
        """See `TrainerGroup`."""
        for tensor in tensors:
            if not tensor.numel():
                continue
            try:
                raw = tensor.view(-1).view(torch.uint8)
                self._group.broadcast(raw, _TRAINER).wait(timedelta(seconds=deadline.remaining))
            except RuntimeError as error:
                self.close()
                if deadline.expired:
                    raise _late(deadline) from error
                raise CheckpointEngineError(f"the trainer is gone, it must init anew: {error}") from error

    def close(self) -> None:
        """See `TrainerGroup`."""
        self._group = _Closed()


class _Nccl:
    """On a stream of its own, so that a trainer which never sends keeps nothing else waiting."""

    def __init__(self, place: GroupPlace, device: torch.device) -> None:
        self._communicator: Any = _communicator(place, device)
        if getattr(self._communicator, "disabled", False):
            raise MissingDependencyError("vLLM finds no NCCL library here; its log says why")
        self._stream: Any = _cuda.Stream(device)

    def receive(self, tensors: Sequence[torch.Tensor], deadline: Deadline) -> None:
        """See `TrainerGroup`."""
        self._stream.wait_stream(_cuda.current_stream())  # what lay in this memory before may still be read
        for tensor in tensors:
            self._communicator.broadcast(tensor, src=_TRAINER, stream=self._stream)
        arrived = self._stream.record_event()
        while not arrived.query():
            if deadline.expired:
                self.close()
                raise _late(deadline)
            time.sleep(_LOOK)

    def close(self) -> None:
        """See `TrainerGroup`; what waits for a trainer that is gone is ended."""
        communicator, self._communicator = self._communicator, _Closed()
        if hasattr(communicator, "destroy"):
            communicator.destroy()


class _Closed:
    """In place of a group that was left."""

    def broadcast(self, *_: object, **__: object) -> None:
        """Nobody is there.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("its group was closed after a failure")


def _communicator(place: GroupPlace, device: torch.device) -> Any:  # noqa: ANN401 - vLLM's own class
    kind: Any = importlib.import_module("vllm.distributed.device_communicators.pynccl").PyNcclCommunicator
    with _unpinned():
        if place.unique_id is not None:
            return kind.from_unique_id_bytes(place.unique_id, place.rank, place.world_size, device)
        meeting: Any = importlib.import_module("vllm.distributed.utils").StatelessProcessGroup
        group = meeting.create(place.host, place.port, place.rank, place.world_size)
        return kind(group, device=device)


def _unpinned() -> AbstractContextManager[object]:
    """As newer vLLMs make communicators with others than their own workers."""
    try:
        return cast("AbstractContextManager[object]", importlib.import_module("vllm.utils.nccl").unpinned_nccl_env())
    except (ImportError, AttributeError):
        return contextlib.nullcontext()


def _late(deadline: Deadline) -> DeadlineError:
    return DeadlineError(
        f"the trainer did not send within {deadline.said} what it announced; its group is closed, it must init anew"
    )
