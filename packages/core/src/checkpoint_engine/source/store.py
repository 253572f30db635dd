"""The checkpoints that one rank holds in host memory."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from checkpoint_engine.catalog import SegmentEntry, ShardPlace, TensorEntry
from checkpoint_engine.device.base import Device, Pinned
from checkpoint_engine.errors import CheckpointStateError, DuplicateTensorError
from checkpoint_engine.host.numa import on_node_of
from checkpoint_engine.source.copies_in_files import is_same_in_file
from checkpoint_engine.source.device_segment import DeviceSegment, InPlace, keep_in_place
from checkpoint_engine.source.filling import Filled, NewSegments, SegmentSource
from checkpoint_engine.source.given_before import GivenBefore
from checkpoint_engine.source.loader import Files, Selection, iterate_files, iterate_tensors, require_carriable, select
from checkpoint_engine.source.pool import SegmentPool
from checkpoint_engine.source.refill import NewFiles, NewTensors, Refill
from checkpoint_engine.source.refill_plan import RefillPlan
from checkpoint_engine.source.safetensors_file import Opener
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.shards import LocalTensors, NamedTensors, local_tensors

__all__ = ["CheckpointStore", "Farewell", "HeldSegment", "Registered", "identity_of"]

_log = logging.getLogger(__name__)

_PINNING_THREADS = 4


HeldSegment = Segment | DeviceSegment
_Choose = Callable[[], list[Selection]]
"""Reads the headers of files, once it is clear that they will be registered."""


@dataclass(frozen=True)
class Registered:
    """A checkpoint in pinned host memory, or where its tensors lie. `entries[i]` describes `segments[i]`."""

    name: str
    segments: list[HeldSegment]
    entries: list[SegmentEntry]
    pooled: bool = False
    refill: Refill | None = None
    """What brings its bytes, if they are not all there yet."""
    shards: Mapping[str, tuple[str, ShardPlace]] = field(default_factory=dict[str, tuple[str, ShardPlace]])
    """Label of a shard -> name of its tensor, and its place; see `LocalTensors`."""
    check_bytes: Callable[[], None] | None = None
    """Raises if bytes are not those that were registered, where that is looked at."""

    @property
    def pins(self) -> list[Pinned]:
        """The device's handles on the segments."""
        return [s.pinned for s in self.segments if isinstance(s, Segment) and s.pinned is not None]

    @property
    def host_segments(self) -> list[Segment]:
        """The segments, which all lie in host memory.

        Raises:
            CheckpointStateError: one does not.
        """
        found = [segment for segment in self.segments if isinstance(segment, Segment)]
        if len(found) < len(self.segments):
            raise CheckpointStateError(
                f"tensors of {self.name!r} lie in device memory, which other hosts cannot read; register it without "
                "in_place=True to share it"
            )
        return found

    @property
    def is_of_others(self) -> bool:
        """Whether some of the memory is not ours to keep."""
        return any(isinstance(segment, DeviceSegment) for segment in self.segments)

    @property
    def files_in_place(self) -> list[Segment]:
        """The segments that are files, which whoever may write to these can change."""
        return [segment for segment in self.segments if isinstance(segment, Segment) and segment.file is not None]

    @property
    def identities_in_place(self) -> dict[Path, tuple[int, int]]:
        """Their paths, and which files those were."""
        return {one.file: identity_of(os.fstat(one.fd)) for one in self.files_in_place if one.file is not None}

    @property
    def can_change(self) -> bool:
        """Whether `check` has something to look at."""
        return bool(self.files_in_place) or self.check_bytes is not None

    def check(self) -> None:
        """Raises if what was registered is not what it was, as far as that is looked at.

        Raises:
            CheckpointFormatError: a file that is used in place was written to, or bytes of memory have changed.
        """
        for segment in self.files_in_place:
            segment.check()
        if self.check_bytes is not None:
            self.check_bytes()

    def is_exactly(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether it consists of these very tensors, where they are."""
        return all(isinstance(segment, DeviceSegment) and segment.holds(tensors) for segment in self.segments)

    def refilled(
        self, tensors: Mapping[str, torch.Tensor], selections: Sequence[Selection]
    ) -> Callable[[], Registered] | None:
        """What starts to fill it with these where it lies; None if it cannot be: they are others, or it is not ours.

        Raises:
            UnsupportedTensorError: one of them cannot be carried at all.
        """
        if not self.pooled or self.is_of_others or self.files_in_place or (tensors and selections):
            return None
        if self.check_bytes is not None:  # what describes it has checksums of the bytes that are there
            return None
        plan = self.refill.plan if self.refill is not None else RefillPlan(self.entries)
        if selections:
            ranges = plan.ranges(selections)
            new = None if ranges is None else NewFiles(plan, ranges)
        else:
            values = plan.sources(tensors)
            new = None if values is None else NewTensors(plan, values)
        return None if new is None else lambda: replace(self, refill=Refill(new, self.host_segments))

    def settle(self) -> None:
        """Nothing is written to it any more."""
        if self.refill is not None:
            self.refill.give_up()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for entry in self.entries for tensor in entry.tensors)


class Farewell(Protocol):
    """Told that a checkpoint goes, before it does."""

    def __call__(self, name: str, *, stays: bool) -> None:
        """`stays`: the next one will lie in the same memory."""
        ...


def identity_of(stat: os.stat_result) -> tuple[int, int]:
    """What tells a file from another of the same path."""
    return stat.st_dev, stat.st_ino


class CheckpointStore:
    """Registers checkpoints, keeps them, and lets go of them. Safe for several threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool = SegmentPool()
        self._lock = threading.Lock()
        self._registered: dict[str, Registered] = {}
        self._being_registered: set[str] = set()
        self._users: dict[str, int] = {}
        self._given: defaultdict[str, GivenBefore] = defaultdict(GivenBefore)

    def register(
        self,
        name: str,
        *,
        files: Files | None = None,
        named_tensors: NamedTensors | None = None,
        in_place: bool = True,
        pool: bool = False,
        tensors_stay: bool = False,
        opener: Opener = os.open,
    ) -> Registered:
        """Brings a checkpoint into pinned host memory. Neither files nor tensors need to be given, or both.

        Args:
            name: Under which it is known from now on.
            files: `.safetensors` files, or for each the names of the tensors to take.
            named_tensors: Tensors or shards of some in memory, which are copied.
            in_place: Whether files that lie on tmpfs are used where they are instead of being copied.
            pool: Whether memory is taken from what earlier pooled checkpoints left, and left for later ones.
            tensors_stay: Whether tensors on this rank's device are not copied, as far as others can map them there.
            opener: How files are opened.

        Raises:
            CheckpointStateError: the name is taken; the checkpoint that has it stays.
            CheckpointFormatError: a file is missing or broken.
            DuplicateTensorError: a tensor name occurs twice, with other bytes.
            UnsupportedTensorError: a tensor cannot be carried.
            HostMemoryError: memory is short.
        """
        return self._register(
            name,
            local_tensors(named_tensors or {}),
            lambda: select(files or (), opener),
            in_place=in_place,
            pool=pool,
            tensors_stay=tensors_stay,
        )

    def _register(
        self, name: str, local: LocalTensors, choose: _Choose, *, in_place: bool, pool: bool, tensors_stay: bool
    ) -> Registered:
        with self._lock:
            if name in self._registered or name in self._being_registered:
                raise CheckpointStateError(
                    f"checkpoint {name!r} is registered already; unregister it first or choose another name"
                )
            self._being_registered.add(name)
        try:
            require_carriable(local.tensors)
            staying = keep_in_place(local.tensors, self._device) if tensors_stay else InPlace(local.tensors)
            registered = self._load(name, choose, local, staying, in_place=in_place, pooled=pool)
            with self._lock:
                self._registered[name] = registered
        finally:
            with self._lock:
                self._being_registered.discard(name)
        return registered

    def refresh(
        self,
        name: str,
        tensors: NamedTensors,
        *,
        files: Files = (),
        opener: Opener = os.open,
        tensors_stay: bool,
        at_once: bool = False,
        farewell: Farewell,
    ) -> bool:
        """Registers tensors or files under a name that may have others; returns whether they lie where those did not.

        Tensors that stay where they are, and are the very ones that are registered, cost nothing. Others of the same
        names, dtypes and shapes take the places of those that are registered; with `at_once` they may still be on their
        way when this returns, and they and their files stay as they are until all are there. `farewell` is told before
        the memory of others goes.

        Raises:
            CheckpointStateError: what is registered under the name is in use.
            CheckpointEngineError: as `register`; what was registered stays if a header is broken, else nothing is.
        """
        local, before = self._given[name].local_tensors(tensors), self._registered.get(name)
        selections = select(files, opener)
        if before is not None:
            alike = before.shards == local.shards
            if alike and tensors_stay and not selections and before.is_exactly(local.tensors):
                return False
            if alike and at_once and (refilled := before.refilled(local.tensors, selections)) is not None:
                self._refill(before, refilled, farewell)
                return False
            self.unregister(name, farewell=lambda: farewell(name, stays=not before.is_of_others))
        after = self._register(name, local, lambda: selections, in_place=True, pool=True, tensors_stay=tensors_stay)
        return before is None or before.entries != after.entries

    def _refill(self, before: Registered, refilled: Callable[[], Registered], farewell: Farewell) -> None:
        with self._lock:
            self._refuse_if_used(before.name)
        before.settle()
        farewell(before.name, stays=True)
        with self._lock, on_node_of(self._device):
            self._registered[before.name] = refilled()

    def watch_bytes(self, name: str, check: Callable[[], None], entries: list[SegmentEntry]) -> None:
        """From now on `check` is called before and at the end of every update of a checkpoint.

        `entries` describe its segments, with checksums.

        Raises:
            CheckpointStateError: there is none of that name.
        """
        with self._lock:
            self._registered[name] = replace(self._find(name), check_bytes=check, entries=entries)

    def settle(self, name: str) -> None:
        """Returns once nothing is written any more to a checkpoint, if there is one; what is missing stays missing."""
        registered = self._registered.get(name)
        if registered is not None:
            registered.settle()

    def adopt(self, name: str, segments: list[Segment], entries: list[SegmentEntry]) -> Registered:
        """Keeps a checkpoint that is in memory already; `entries[i]` describes `segments[i]`.

        Raises:
            CheckpointStateError: the name is taken.
        """
        with self._lock:
            if name in self._registered or name in self._being_registered:
                raise CheckpointStateError(f"checkpoint {name!r} is registered already; unregister it first")
            self._registered[name] = Registered(name, list(segments), entries)
            return self._registered[name]

    def unregister(self, name: str, *, force: bool = False, farewell: Callable[[], None] | None = None) -> None:
        """Frees a checkpoint; files stay. A pooled one leaves its memory to the pool, unless `force` frees that too.

        `farewell` is called once it is clear that the memory will go, and before it goes.

        Raises:
            CheckpointStateError: there is no such checkpoint, or it is in use.
        """
        with self._lock:
            registered = self._find(name)
            self._refuse_if_used(name)
            del self._registered[name]
            self._given.pop(name, None)
        if farewell is not None:
            farewell()
        self._let_go(registered)
        if force:
            self._pool.drop_idle()

    def get(self, name: str) -> Registered:
        """The checkpoint of that name.

        Raises:
            CheckpointStateError: there is none.
        """
        with self._lock:
            return self._find(name)

    def names(self) -> list[str]:
        """Names of all registered checkpoints, in the order of registration."""
        with self._lock:
            return list(self._registered)

    @contextlib.contextmanager
    def use(self, name: str) -> Generator[Registered, None, None]:
        """Keeps a checkpoint from being unregistered.

        Raises:
            CheckpointStateError: there is none of that name.
            CheckpointFormatError: a file that is used in place was truncated or written to.
        """
        with self._lock:
            registered = self._find(name)
            self._users[name] = self._users.get(name, 0) + 1
        try:
            for segment in registered.segments:
                segment.check()
            yield registered
        finally:
            with self._lock:
                self._users[name] -= 1

    def close(self) -> None:
        """Frees everything, in use or not."""
        with self._lock:
            registered, self._registered = list(self._registered.values()), {}
        for checkpoint in registered:
            checkpoint.settle()
            for segment in checkpoint.segments:
                segment.close()
        self._pool.drop_idle()

    def _refuse_if_used(self, name: str) -> None:
        if self._users.get(name):
            raise CheckpointStateError(f"checkpoint {name!r} is being sent; unregister it once the update is over")

    def _find(self, name: str) -> Registered:
        if name not in self._registered:
            known = ", ".join(map(repr, self._registered)) or "none"
            raise CheckpointStateError(f"checkpoint {name!r} is not registered; registered are: {known}")
        return self._registered[name]

    def _load(
        self, name: str, choose: _Choose, local: LocalTensors, tensors: InPlace, *, in_place: bool, pooled: bool
    ) -> Registered:
        started = time.monotonic()
        selections = choose()
        if selections and local.tensors:
            selections = _without_copies(selections, local)
        source: SegmentSource = self._pool if pooled else NewSegments()

        def fill() -> Generator[Filled, None, None]:
            yield from iterate_files(selections, in_place=in_place, source=source)
            yield from iterate_tensors(tensors.left, source=source, pin=lambda segment: segment.pin(self._device))

        with on_node_of(self._device), contextlib.closing(fill()) as filling:
            filled = self._pin_as_filled(filling)
        segments: list[HeldSegment] = [f.segment for f in filled]
        entries = [f.entry for f in filled]
        if tensors.segment is not None:
            segments.append(tensors.segment)
            entries.append(tensors.segment.entry)
        if tensors.why:
            _log.warning("%d tensors of %r were copied to host memory (%s)", len(tensors.left), name, tensors.why)
        registered = Registered(name, segments, list(map(local.entry, entries)), pooled, shards=local.shards)
        seconds = time.monotonic() - started
        _log.info(
            "registered %r: %.2f GB in %d segments within %.2f s",
            name,
            registered.nbytes / 1e9,
            len(filled),
            seconds,
        )
        return registered

    def _pin_as_filled(self, filling: Iterator[Filled]) -> list[Filled]:
        """Pins segments, several at once, while the next ones are being filled."""
        filled: list[Filled] = []
        pinning: list[Future[None]] = []
        try:
            with ThreadPoolExecutor(_PINNING_THREADS, "checkpoint-engine-pin") as pinner:
                for done in filling:
                    filled.append(done)
                    for earlier in pinning:
                        if earlier.done():
                            earlier.result()
                    pinning.append(pinner.submit(done.segment.pin, self._device))
            for future in pinning:
                future.result()
        except BaseException:
            # The error's traceback still refers to the memory; it must be free for a second attempt all the same.
            for done in filled:
                done.segment.discard()
            raise
        return filled

    def _let_go(self, registered: Registered) -> None:
        registered.settle()
        for segment, entry in zip(registered.segments, registered.entries, strict=True):
            if registered.pooled and isinstance(segment, Segment) and segment.file is None:
                self._pool.give_back(segment, entry)
            else:
                segment.close()


def _without_copies(selections: list[Selection], local: LocalTensors) -> list[Selection]:
    """Leaves out of files what is among the tensors too, byte for byte."""
    return [Selection(s.file, tuple(t for t in s.tensors if not _is_given(s, t, local))) for s in selections]


def _is_given(selection: Selection, tensor: TensorEntry, local: LocalTensors) -> bool:
    given = local.tensors.get(tensor.name)
    if given is None and tensor.name not in local.names:
        return False
    if given is not None and is_same_in_file(selection.file, tensor, given):
        return True
    raise DuplicateTensorError(
        f"tensor {tensor.name!r} is in {selection.file.path} and again among the named tensors, with other bytes"
    )
