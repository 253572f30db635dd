"""The engine worker's side of an update: takes buckets from the link and drives the engine's sink."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine import limits
from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.contract.engine_sink import EngineSink
from checkpoint_engine.contract.figures import Details, details_of
from checkpoint_engine.contract.modes import Operation, mode_of, operation_of
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.contract.reports import name_of_update
from checkpoint_engine.contract.sink import Selective, Update, Verifiable, WeightSink
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import Device, Mapped
from checkpoint_engine.device.memory import Memory
from checkpoint_engine.device.segments import MappedSegments, Part
from checkpoint_engine.errors import (
    CheckpointEngineError,
    LinkClosedError,
    LinkError,
    LinkRefusedError,
    SenderAbortedError,
    WorkerError,
)
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
    Released,
    TensorSlice,
    Wanted,
)
from checkpoint_engine.receiver.cache import ReceiverCache, process_cache
from checkpoint_engine.receiver.deliveries import DeliveryCache, view_bucket
from checkpoint_engine.receiver.layouts import UpdateLayout
from checkpoint_engine.receiver.received_sums import ReceivedSums
from checkpoint_engine.receiver.scattered import ShardAssembly
from checkpoint_engine.version import __version__

_LONGEST_TRACEBACK = 20_000
"""Characters."""

__all__ = ["Received", "pick_handle", "receive_update"]


@dataclass(frozen=True)
class Received:
    """What an update brought: bytes, tensors, and seconds in all and in the engine's own loader."""

    version: str
    operation: Operation
    nbytes: int
    tensors: int
    seconds: float
    load_seconds: float
    details: Details
    """Figures of the sink, as they travel."""

    @property
    def verified(self) -> bool:
        """Whether the engine's weights were only compared with it."""
        return self.operation is Operation.COMPARE


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
    if all(name.startswith(WORKER_NAME) for name in handles) or not device.known_by_identity:
        return list(handles.values())[rank]
    if device.identity not in handles:
        raise WorkerError(
            f"worker {rank} runs on {device.identity}, the update is for {', '.join(handles)}: start the parameter "
            "server on the GPUs of this engine, rank by rank"
        )
    return handles[device.identity]


def receive_update(
    handle: str,
    sink: WeightSink,
    device: Device,
    *,
    timeout: float = limits.UPDATE,
    cache: ReceiverCache | None = None,
    cancel: Cancel | None = None,
) -> Received:
    """Takes one update from the parameter server that gave out `handle`.

    Args:
        handle: Where to connect, as given by the parameter server.
        sink: Puts the tensors into the engine.
        device: Where the engine's weights live.
        timeout: Seconds for the whole update.
        cache: What this worker keeps from one update for the next; the process's if None.
        cancel: A switch by which another thread gives the update up; it is then aborted as if it had failed.

    Raises:
        CheckpointEngineError: the update did not complete: the sink was aborted, and the sender was told. Or it did,
            and only the sender could not be told; what the sink holds says which.
    """
    deadline = Deadline(timeout)
    channel, token = connect(handle, deadline, cancel)
    cache = cache or process_cache()
    offered = cache.layouts.snapshot()
    with channel:
        channel.send(
            Hello(
                PROTOCOL,
                token,
                device.identity,
                __version__,
                str(torch.__version__),
                os.getpid(),
                tuple(offered),
                isinstance(sink, EngineSink) and sink.takes_parts,
                _last_brought(sink),
            ),
            deadline,
        )
        return _Reception(channel, sink, device, deadline, cache, offered, name_of_update(handle)).run()


class _Reception:
    """One update under way."""

    def __init__(
        self,
        channel: ReceiverChannel,
        sink: WeightSink,
        device: Device,
        deadline: Deadline,
        cache: ReceiverCache,
        offered: Mapping[str, UpdateLayout],
        name: str,
    ) -> None:
        self._channel = channel
        self._cache = cache
        self._offered = offered
        self._sink = sink
        self._device = device
        self._deadline = deadline
        self._name = name
        """Of the update, as no other has it: a sender counts its own anew whenever it starts."""
        self._phase = Phase.BEGIN
        self._begun = False
        self._whole = True
        """Whether the engine's weights are whole, as far as the sink has said."""
        self._complete = False
        """Whether they are those of this update."""
        self._load_seconds = 0.0
        self._sums: ReceivedSums | None = None

    def run(self) -> Received:
        start = time.perf_counter()
        try:
            with self._mapped_staging() as (begin, staging), self._aborting_on_error():
                layout = self._cache.layouts.layout_of(begin, self._offered)
                self._begin(begin, layout)
                self._load_all(begin, layout, staging)
                self._let_go(begin, staging)
                details, seconds = self._finish()
        except Exception as error:
            self._say_goodbye(error)
            raise
        self._say_finished(Finished(begin.version, seconds, details))
        return Received(
            version=begin.version,
            operation=operation_of(begin.reload),
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
        with self._cache.mappings.mapped_staging(self._device, begin.staging, self._channel) as staging:
            yield begin, staging

    def _begin(self, begin: Begin, layout: UpdateLayout) -> None:
        if operation_of(begin.reload) is Operation.COMPARE:
            self._sink = _verifier_of(self._sink)
        mode = mode_of(begin.reload)
        self._begun = True
        self._sink.begin(
            Update(
                self._name,
                begin.checkpoint,
                begin.version,
                layout.tensors,
                mode,
                compared=begin.checksums,
                partial=begin.partial,
            )
        )
        self._send(Accepted(tuple(_wanted(self._sink, layout.buckets[index].entries) for index in begin.away)))

    def _load_all(self, begin: Begin, layout: UpdateLayout, staging: Mapped) -> None:
        self._phase = Phase.LOAD
        buckets = layout.buckets
        deliveries = _Deliveries(layout, self._cache.deliveries, staging, begin.staging, self._device.torch_device)
        done: set[int] = set()
        if begin.checksums:
            self._sums = ReceivedSums(layout, self._device.torch_device)
        while (message := self._next_load(len(buckets), done)) is not None:
            began = time.perf_counter()
            done.add(message.bucket)
            delivery = deliveries.of(message, lambda segment: self._part(staging, segment))
            if delivery is not None:
                self._sink.load(delivery)
            if self._sums is not None:
                self._sums.take(message, self._part(staging, message.segment))
            if _is_overwritten(staging, message) or len(done) == len(buckets):
                self._device.synchronize()
            seconds = time.perf_counter() - began
            self._load_seconds += seconds
            self._send(Loaded(message.bucket, seconds, began))
        if len(done) != len(buckets):
            raise LinkError(f"the parameter server finished after {len(done)} of {len(buckets)} buckets")

    def _next_load(self, buckets: int, done: Collection[int]) -> Load | None:
        """The next bucket; None once the parameter server says that there are no more."""
        message = self._receive("the next bucket")
        if isinstance(message, Finish):
            if self._sums is not None and len(done) == buckets:
                self._sums.check(message.sums)
            return None
        if not isinstance(message, Load) or not 0 <= message.bucket < buckets:
            raise LinkError(f"expected a bucket, {message} came")
        if message.bucket in done:
            raise LinkError(f"bucket {message.bucket} came twice")
        return message

    def _part(self, mapped: Mapped, segment: int) -> Part:
        if isinstance(mapped, MappedSegments):
            return mapped.part(segment, self._deadline)
        if segment:
            raise LinkError(f"a bucket lies in segment {segment} of staging memory, which has one")
        return mapped.tensor

    def _let_go(self, begin: Begin, staging: Mapped) -> None:
        """Unmaps staging before the engine completes the update, which may take memory, unless it is to stay mapped.

        Nothing refers to it any more: a sink has copied what it needs for longer than its `load`.
        """
        if not begin.staging.lease:
            staging.close()
            with contextlib.suppress(LinkClosedError):  # all have everything: it is completed all the same
                self._send(Released())

    def _finish(self) -> tuple[dict[str, str | int | float], float]:
        """Completes the update; it has, once the device has done all that it was told."""
        self._phase = Phase.FINISH
        start = time.perf_counter()
        details = details_of(self._sink.finish())
        self._device.synchronize()
        self._complete = True
        return details, time.perf_counter() - start

    def _say_finished(self, answer: Finished) -> None:
        try:
            self._send(answer)
        except CheckpointEngineError as error:
            raise type(error)(
                f"the update is complete, and this worker holds version {answer.version!r}; only the parameter server "
                f"could not be told: {error}"
            ) from error

    @contextlib.contextmanager
    def _aborting_on_error(self) -> Generator[None]:
        """Puts the engine into a known state while memory that it may refer to is still mapped."""
        try:
            yield
        except Exception:
            if self._begun:
                self._whole = False
                self._whole = self._sink.abort()
            raise

    def _say_goodbye(self, error: Exception) -> None:
        answer = (
            Aborted(dirty=not self._whole)
            if isinstance(error, SenderAbortedError)
            else Failed(
                self._phase, type(error).__name__, str(error), not self._whole, self._complete, _traceback_of(error)
            )
        )
        self._channel.cancel = Cancel()  # whoever gave the update up wants the sender to know
        with contextlib.suppress(CheckpointEngineError):  # the error under way says more than a lost goodbye
            self._channel.send(answer, Deadline(limits.WORKER_GOODBYE))

    def _receive(self, waiting_for: str) -> FromSender:
        message = self._channel.receive(self._deadline, waiting_for)
        if isinstance(message, Abort):
            raise SenderAbortedError(f"the parameter server gave the update up: {message.reason}")
        return message

    def _send(self, message: Accepted | Loaded | Released | Finished) -> None:
        self._channel.send(message, self._deadline)


class _Deliveries:
    """What the buckets of one update bring, one after the other."""

    def __init__(
        self, layout: UpdateLayout, cache: DeliveryCache, staging: Mapped, memory: Memory, device: torch.device
    ) -> None:
        self._layout = layout
        self._staging = staging
        self._lease = memory.lease
        self._known = cache.of(staging, memory)
        self._assembly = ShardAssembly(layout, device, cache.of_shards(staging, memory))

    def of(self, load: Load, find: Callable[[int], Part]) -> Delivery | None:
        """The tensors of a bucket, in the segment that `find` finds; of those in shards, what it completes."""
        bucket = self._layout.buckets[load.bucket]
        if bucket.sharded:
            stays = not _is_overwritten(self._staging, load)
            return self._assembly.add(bucket, find(load.segment), load, stays=stays)
        key = self._layout.name, load
        delivery = self._known.get(key)
        if delivery is None:
            delivery = view_bucket(find(load.segment), bucket, load.offset, stays=self._lease)
            if delivery.stays:
                self._known[key] = delivery
        return delivery


def _is_overwritten(staging: Mapped, load: Load) -> bool:
    """Whether the bucket's memory is written to again as soon as the bucket is said to be loaded.

    Staging memory always is. The ranks' own segments are not, unless they say so: there the device need not fall idle
    between buckets, and is waited for once, after the last of them.
    """
    return load.again or not isinstance(staging, MappedSegments)


def _last_brought(sink: WeightSink) -> str | None:
    """The update that brought what it last held whole, if it keeps books."""
    return sink.life.brought_by if isinstance(sink, EngineSink) else None


def _traceback_of(error: Exception) -> str:
    """The end of it, which says most."""
    return "".join(traceback.format_exception(error))[-_LONGEST_TRACEBACK:]


def _verifier_of(sink: WeightSink) -> WeightSink:
    if not isinstance(sink, Verifiable):
        raise WorkerError(
            f"this engine's plugin ({type(sink).__module__}) cannot compare weights with a checkpoint; upgrade it"
        )
    return sink.verifier()


def _wanted(sink: WeightSink, bucket: Sequence[TensorSlice]) -> Wanted:
    """Ranges of a bucket that the sink will read; whoever does not know that gets all of it.

    A sink thinks of whole tensors: of shards it gets all.
    """
    if not isinstance(sink, Selective) or any(entry.shard is not None for entry in bucket):
        return None
    return sink.wanted([(entry.name, entry.offset) for entry in bucket])
