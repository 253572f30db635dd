"""Communicators over torch's own process groups, made directly so that no global state is involved."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from checkpoint_engine.background import in_background
from checkpoint_engine.collective.base import register_communicator
from checkpoint_engine.errors import MissingDependencyError, RankError, SettingError

__all__ = ["TorchGroup", "open_gloo", "open_nccl"]

_TICK = timedelta(seconds=0.1)


class TorchGroup:
    """A gloo or NCCL group. Failures of a peer surface as `RankError`."""

    def __init__(self, group: dist.ProcessGroup, backend: str) -> None:
        self.rank = group.rank()
        self.world_size = group.size()
        self._group = group
        self._backend = backend
        self._aborted = threading.Event()

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fills `tensor` with that of rank `source`.

        Raises:
            RankError: a peer is gone, or did not take part in time.
        """
        options = dist.BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        with self._peer_errors("broadcast"):
            self._wait(self._group.broadcast([tensor], options), tensor)

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Combines `tensor` over all ranks, in place.

        Raises:
            RankError: a peer is gone, or did not take part in time.
        """
        options = dist.AllreduceOptions()
        options.reduceOp = op  # pyright: ignore[reportAttributeAccessIssue] - the stub lacks the conversion
        with self._peer_errors("all-reduce"):
            self._wait(self._group.allreduce([tensor], options), tensor)

    def set_timeout(self, timeout: timedelta) -> None:
        """Bounds every later operation."""
        cast("Any", self._group)._set_default_timeout(timeout)

    def abort(self) -> None:
        """Makes calls that hang fail."""
        self._aborted.set()
        # It may have failed by itself, which is what we want, or another thread has closed it meanwhile.
        with contextlib.suppress(RuntimeError, AttributeError):
            self._group.abort()

    def close(self) -> None:
        """Frees the group."""
        with contextlib.suppress(RuntimeError):  # peers that are gone already do not matter here
            self._group.shutdown()
        groups = [self._group]
        del self._group
        if self._aborted.is_set():  # it may wait for a host that is lost, until the time is over that it was given
            in_background(groups.clear, "checkpoint-engine-close")
        else:
            groups.clear()  # gloo closes its connections only now

    def _wait(self, work: dist.Work, tensor: torch.Tensor) -> None:
        """Until it is done. What NCCL does waits in its stream and can be aborted there; what gloo does is left alone.

        Not where it would write to a GPU: that memory is freed under it. Host memory lives as long as the tensor does.
        """
        if self._backend != "gloo" or not tensor.is_cpu:
            work.wait()
            return
        while not _ends_soon(work):
            if self._aborted.is_set():
                raise RankError(f"the gloo group of rank {self.rank} was given up")

    @contextlib.contextmanager
    def _peer_errors(self, what: str) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(f"the {self._backend} {what} failed on rank {self.rank}: {_first_line(error)}") from error


def open_gloo(store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: torch.device) -> TorchGroup:
    """A gloo group; it takes tensors of any device, those of a GPU by way of the host.

    Raises:
        RankError: a rank did not come in time.
    """
    del device
    with _connecting("gloo", rank):
        group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
    return TorchGroup(cast("dist.ProcessGroup", group), "gloo")


def open_nccl(store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: torch.device) -> TorchGroup:
    """An NCCL group, connected at once.

    Raises:
        SettingError: the device is no GPU.
        MissingDependencyError: this torch has no NCCL.
        RankError: a rank did not come in time, or NCCL cannot connect the devices.
    """
    if device.type != "cuda":
        raise SettingError(
            f"NCCL moves tensors of GPUs, not of {device}: set CHECKPOINT_ENGINE_COLLECTIVE to gloo, or to auto"
        )
    if not dist.is_nccl_available():
        raise MissingDependencyError("this torch has no NCCL; install a CUDA build of torch")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):  # else torch ends the whole process on an error
        group = dist.ProcessGroupNCCL(store, rank, world_size, options)
    with _connecting("nccl", rank):
        group.eager_connect_single_device(device)
    return TorchGroup(cast("dist.ProcessGroup", group), "nccl")


def _ends_soon(work: dist.Work) -> bool:
    try:
        work.wait(_TICK)
    except RuntimeError:  # the time is over, or it has failed
        if not work.is_completed():
            return False
        work.wait()  # it may have been done well just after the time was over; else this says why it failed
    return True


@contextlib.contextmanager
def _connecting(backend: str, rank: int) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank} could not connect to the other ranks by {backend}: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Generator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


register_communicator("gloo", open_gloo)
register_communicator("nccl", open_nccl)
