"""The engine worker's side of an update: takes buckets from the link and drives the engine's adapter."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import Device, Mapped
from checkpoint_engine.device.base import Memory
from checkpoint_engine.device.segments import MappedSegments
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.engine.adapter import Adapter, Selective, Update, Verifiable
from checkpoint_engine.engine.layouts import Bucket, Layout, known_layouts, layout_of
from checkpoint_engine.engine.mappings import mapped_staging
from checkpoint_engine.errors import CheckpointEngineError, LinkError, LinkRefusedError, WorkerError
from checkpoint_engine.link.channel import ReceiverChannel, connect
from checkpoint_engine.link.messages import (
    PROTOCOL,
    WORKER_NAME,
    Abort,
    Aborted,
    Accepted,
    Begin,
    Failed,
    Finish,
    Finished,
    FromSender,
    Hello,
    Load,
    Loaded,
    TensorSlice,
    Wanted,
)
from checkpoint_engine.reload.delivery import Delivery
from checkpoint_engine.reload.regions import contiguous
from checkpoint_engine.version import __version__

_GOODBYE_SECONDS = 5.0


@dataclass(frozen=True)
class Received:
    """What an update brought: bytes, tensors, and seconds in all and in the engine's own loader."""

    version: str
    verified: bool
    """Whether the engine's weights were only compared with it."""
    nbytes: int
    tensors: int
    seconds: float
    load_seconds: float
    details: Mapping[str, str | int | float]


def pick_handle(handles: Mapping[str, str], device: Device, rank: int, world_size: int) -> str:
    """The handle meant for this worker.

    A GPU is found by its identity. CPU workers have none that both sides know, and a sender without a GPU does not know
    that of the workers' GPUs: there the order of ranks counts.

    Args:
        handles: Device identity, or `worker:` and a number -> handle, for the workers of one engine, in order of rank.
        device: The worker's device.
        rank: The worker's rank in its engine.
        world_size: Number of workers of the engine.

    Raises:
        WorkerError: no handle is meant for this worker.
    """
    if len(handles) != world_size:
        raise WorkerError(
            f"the update brings weights for {len(handles)} workers, this engine has {world_size}: "
            f"pass --tensor-parallel-size {world_size} (or give this engine's ranks only)"
        )
    if device.torch_device.type == "cpu" or all(name.startswith(WORKER_NAME) for name in handles):
        return list(handles.values())[rank]
    if device.identity not in handles:
        raise WorkerError(
            f"worker {rank} runs on {device.identity}, the update is for {', '.join(handles)}: start the parameter "
            "server on the GPUs of this engine, rank by rank"
        )
    return handles[device.identity]


def receive_update(handle: str, adapter: Adapter, device: Device, *, timeout: float = 600.0) -> Received:
    """Takes one update from the parameter server that gave out `handle`.

    Args:
        handle: Where to connect, as given by the parameter server.
        adapter: Puts the tensors into the engine.
        device: Where the engine's weights live.
        timeout: Seconds for the whole update.

    Raises:
        CheckpointEngineError: the update did not complete. The adapter was aborted, and the sender was told.
    """
    deadline = Deadline(timeout)
    channel, token = connect(handle, deadline)
    known = known_layouts()
    with channel:
        channel.send(
            Hello(PROTOCOL, token, device.identity, __version__, str(torch.__version__), os.getpid(), tuple(known)),
            deadline,
        )
        return _Reception(channel, adapter, device, deadline, known).run()


class _Reception:
    """One update under way."""

    def __init__(
        self,
        channel: ReceiverChannel,
        adapter: Adapter,
        device: Device,
        deadline: Deadline,
        known: Mapping[str, Layout],
    ) -> None:
        self._channel = channel
        self._known = known
        self._adapter = adapter
        self._device = device
        self._deadline = deadline
        self._phase = "begin"
        self._begun = False
        self._restored = True
        self._load_seconds = 0.0

    def run(self) -> Received:
        start = time.perf_counter()
        try:
            with self._mapped_staging() as (begin, staging), self._aborting_on_error():
                layout = layout_of(begin, self._known)
                self._begin(begin, layout)
                self._load_all(begin, layout, staging)
                details, seconds = self._finish()
        except Exception as error:
            self._say_goodbye(error)
            raise
        # Only now: the sender frees the staging memory once it hears this.
        self._send(Finished(begin.version, seconds, dict(details)))
        return Received(
            version=begin.version,
            verified=begin.reload == "verify",
            nbytes=layout.nbytes,
            tensors=len(layout.tensors),
            seconds=time.perf_counter() - start,
            load_seconds=self._load_seconds,
            details=details,
        )

    @contextlib.contextmanager
    def _mapped_staging(self) -> Generator[tuple[Begin, Mapped]]:
        begin = self._receive("the start of the update")
        if not isinstance(begin, Begin):
            raise LinkError(f"an update starts with Begin, {type(begin).__name__} came")
        if begin.protocol != PROTOCOL:
            raise LinkRefusedError(
                f"the parameter server speaks link protocol {begin.protocol} (checkpoint-engine-core {begin.library}), "
                f"this engine {PROTOCOL}; install matching versions in both environments"
            )
        with mapped_staging(self._device, begin.staging, self._channel) as staging:
            yield begin, staging

    def _begin(self, begin: Begin, layout: Layout) -> None:
        if begin.reload == "verify":
            self._adapter = _verifier_of(self._adapter)
        self._begun = True
        self._adapter.begin(Update(begin.update_id, begin.checkpoint, begin.version, layout.tensors, begin.reload))
        self._send(Accepted(tuple(_wanted(self._adapter, layout.buckets[index].entries) for index in begin.away)))

    def _load_all(self, begin: Begin, layout: Layout, staging: Mapped) -> None:
        self._phase = "load"
        buckets = layout.buckets
        deliveries = _deliveries_of(staging, begin.staging)
        done: set[int] = set()
        while True:
            message = self._receive("the next bucket")
            if isinstance(message, Finish):
                break
            if not isinstance(message, Load) or not 0 <= message.bucket < len(buckets):
                raise LinkError(f"expected a bucket, {message} came")
            if message.bucket in done:
                raise LinkError(f"bucket {message.bucket} came twice")
            began = time.perf_counter()
            done.add(message.bucket)
            key = (layout.name, message)
            delivery = deliveries.get(key)
            if delivery is None:
                memory = self._part(staging, message.segment)
                delivery = view_bucket(memory, buckets[message.bucket], message.offset, stays=begin.staging.lease)
                if delivery.stays:
                    deliveries[key] = delivery
            self._adapter.load(delivery)
            # Staging is used again, lent memory is not: there the bus need not fall idle between buckets.
            if not isinstance(staging, MappedSegments) or message.again or len(done) == len(buckets):
                self._device.synchronize()
            seconds = time.perf_counter() - began
            self._load_seconds += seconds
            self._send(Loaded(message.bucket, seconds, began))
        if len(done) != len(buckets):
            raise LinkError(f"the parameter server finished after {len(done)} of {len(buckets)} buckets")

    def _part(self, mapped: Mapped, segment: int) -> torch.Tensor:
        if isinstance(mapped, MappedSegments):
            return mapped.part(segment, self._deadline)
        if segment:
            raise LinkError(f"a bucket lies in segment {segment} of staging memory, which has one")
        return mapped.tensor

    def _finish(self) -> tuple[Mapping[str, str | int | float], float]:
        self._phase = "finish"
        start = time.perf_counter()
        details = self._adapter.finish()
        self._device.synchronize()
        return details, time.perf_counter() - start

    @contextlib.contextmanager
    def _aborting_on_error(self) -> Generator[None]:
        """Puts the engine into a known state while the staging memory, which it may refer to, is still mapped."""
        try:
            yield
        except Exception:
            if self._begun:
                self._restored = False
                self._restored = self._adapter.abort()
            raise

    def _say_goodbye(self, error: Exception) -> None:
        answer = (
            Aborted(dirty=not self._restored)
            if isinstance(error, UpdateAbortedError)
            else Failed(self._phase, type(error).__name__, str(error), dirty=not self._restored)
        )
        with contextlib.suppress(CheckpointEngineError):  # the error under way says more than a lost goodbye
            self._channel.send(answer, Deadline(_GOODBYE_SECONDS))

    def _receive(self, waiting_for: str) -> FromSender:
        message = self._channel.receive(self._deadline, waiting_for)
        if isinstance(message, Abort):
            raise UpdateAbortedError(f"the parameter server gave the update up: {message.reason}")
        return message

    def _send(self, message: Accepted | Loaded | Finished) -> None:
        self._channel.send(message, self._deadline)


class UpdateAbortedError(WorkerError):
    """The parameter server told this worker to give the update up."""


def _verifier_of(adapter: Adapter) -> Adapter:
    if not isinstance(adapter, Verifiable):
        raise WorkerError(
            f"this engine's plugin ({type(adapter).__module__}) cannot compare weights with a checkpoint; upgrade it"
        )
    return adapter.verifier()


def _wanted(adapter: Adapter, bucket: Sequence[TensorSlice]) -> Wanted:
    """Ranges of a bucket that the adapter will read; whoever does not know that gets all of it."""
    if not isinstance(adapter, Selective):
        return None
    return adapter.wanted([(entry.name, entry.offset) for entry in bucket])


_kept: WeakKeyDictionary[Mapped, dict[tuple[str, Load], Delivery]] = WeakKeyDictionary()
"""What was delivered out of memory that may stay mapped after the update."""


def _deliveries_of(mapped: Mapped, memory: Memory) -> dict[tuple[str, Load], Delivery]:
    return _kept.setdefault(mapped, {}) if memory.lease else {}


def view_bucket(staging: torch.Tensor, bucket: Bucket, offset: int, *, stays: object = False) -> Delivery:
    """The tensors of a bucket that lies `offset` bytes into the staging memory, which `stays` or does not.

    A file used in place may hold tensors at addresses that their dtype does not allow; those are copied out.

    Raises:
        LinkError: a tensor would leave the staging memory.
    """
    if not bucket.fits(offset, staging.numel()):
        raise LinkError(
            f"a bucket of {len(bucket.names)} tensors ({', '.join(bucket.names[:1])} …) at byte {offset} leaves the "
            f"staging memory of {staging.numel()} bytes"
        )
    aligned = bucket.alignment > 0 and offset % bucket.alignment == 0
    return Delivery(
        bucket.names,
        bucket.nbytes,
        partial(_tensors_in, staging, bucket, offset),
        staging,
        start=offset,
        bucket=bucket if aligned else None,
        stays=bool(stays) and aligned,
    )


def _tensors_in(staging: torch.Tensor, bucket: Bucket, offset: int) -> list[tuple[str, torch.Tensor]]:
    views: dict[str, torch.Tensor] = {}
    result: list[tuple[str, torch.Tensor]] = []
    for entry in bucket.entries:
        begin, dtype = offset + entry.offset, torch_dtype(entry.dtype)
        view = views.get(entry.dtype)
        if view is None:
            # One view of all of it for each dtype: a thousand small tensors then cost one operation each.
            views[entry.dtype] = view = staging[: staging.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if begin % dtype.itemsize:
            end = begin + math.prod(entry.shape) * dtype.itemsize
            tensor = staging[begin:end].clone().view(dtype).view(entry.shape)
        else:
            place = int(view.storage_offset()) + begin // dtype.itemsize
            tensor = view.as_strided(entry.shape, contiguous(entry.shape), place)
        result.append((entry.name, tensor))
    return result
