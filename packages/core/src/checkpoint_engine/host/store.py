"""The checkpoints that one rank holds in host memory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from checkpoint_engine.catalog import SegmentEntry
from checkpoint_engine.device.base import Device, Pinned
from checkpoint_engine.errors import CheckpointStateError, DuplicateTensorError, HostMemoryError
from checkpoint_engine.host.filling import Filled, NewSegments, SegmentSource
from checkpoint_engine.host.loader import Files, Selection, iterate_files, iterate_tensors, select
from checkpoint_engine.host.numa import near
from checkpoint_engine.host.segment import Segment

_log = logging.getLogger(__name__)

_PINNING_THREADS = 4


@dataclass(frozen=True)
class Registered:
    """A checkpoint in host memory, pinned. `entries[i]` describes `segments[i]`."""

    name: str
    segments: list[Segment]
    entries: list[SegmentEntry]
    pooled: bool = False

    @property
    def pins(self) -> list[Pinned]:
        """The device's handles on the segments."""
        return [segment.pinned for segment in self.segments if segment.pinned is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for entry in self.entries for tensor in entry.tensors)


class SegmentPool:
    """Segments that a checkpoint left behind, still pinned, for the next one whatever its shapes."""

    def __init__(self) -> None:
        self._idle: list[Segment] = []
        self._lock = threading.Lock()

    @property
    def spare(self) -> int:
        """Bytes that lie idle."""
        with self._lock:
            return sum(segment.nbytes for segment in self._idle)

    def take(self, smallest: int, wanted: int) -> Segment:
        """The largest idle segment if it is large enough, else a new one.

        Raises:
            HostMemoryError: memory is short even without the idle segments.
        """
        with self._lock:
            if wanted and self._idle and self._idle[-1].nbytes >= smallest:
                return self._idle.pop()
        try:
            return Segment.create(max(smallest, wanted))
        except HostMemoryError:
            if not self.spare:
                raise
            self.drop_idle()
            return Segment.create(max(smallest, wanted))

    def give_back(self, segment: Segment) -> None:
        """Keeps a segment for later."""
        if not segment.nbytes:
            segment.close()
            return
        with self._lock:
            self._idle.append(segment)
            self._idle.sort(key=lambda idle: idle.nbytes)

    def drop_idle(self) -> None:
        """Frees what lies idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for segment in idle:
            segment.close()


class CheckpointStore:
    """Registers checkpoints, keeps them, and lets go of them. Safe for several threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool = SegmentPool()
        self._lock = threading.Lock()
        self._registered: dict[str, Registered] = {}
        self._being_registered: set[str] = set()
        self._users: dict[str, int] = {}

    def register(
        self,
        name: str,
        *,
        files: Files | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        in_place: bool = True,
        pool: bool = False,
    ) -> Registered:
        """Brings a checkpoint into pinned host memory. Neither files nor tensors need to be given, or both.

        Args:
            name: Under which it is known from now on.
            files: `.safetensors` files, or for each the names of the tensors to take.
            named_tensors: Tensors in memory, which are copied.
            in_place: Whether files that lie on tmpfs are used where they are instead of being copied.
            pool: Whether memory is taken from what earlier pooled checkpoints left, and left for later ones.

        Raises:
            CheckpointStateError: the name is taken; the checkpoint that has it stays.
            CheckpointFormatError: a file is missing or broken.
            DuplicateTensorError: a tensor name occurs twice.
            UnsupportedTensorError: a tensor cannot be carried.
            HostMemoryError: memory is short.
        """
        with self._lock:
            if name in self._registered or name in self._being_registered:
                raise CheckpointStateError(
                    f"checkpoint {name!r} is registered already; unregister it first or choose another name"
                )
            self._being_registered.add(name)
        try:
            registered = self._load(name, files or (), named_tensors or {}, in_place=in_place, pooled=pool)
            with self._lock:
                self._registered[name] = registered
        finally:
            with self._lock:
                self._being_registered.discard(name)
        return registered

    def adopt(self, name: str, segments: list[Segment], entries: list[SegmentEntry]) -> Registered:
        """Keeps a checkpoint that is in memory already; `entries[i]` describes `segments[i]`.

        Raises:
            CheckpointStateError: the name is taken.
        """
        with self._lock:
            if name in self._registered or name in self._being_registered:
                raise CheckpointStateError(f"checkpoint {name!r} is registered already; unregister it first")
            self._registered[name] = Registered(name, segments, entries)
            return self._registered[name]

    def unregister(self, name: str, *, force: bool = False, farewell: Callable[[], None] | None = None) -> None:
        """Frees a checkpoint; files stay. A pooled one leaves its memory to the pool, unless `force` frees that too.

        `farewell` is called once it is clear that the memory will go, and before it goes.

        Raises:
            CheckpointStateError: there is no such checkpoint, or it is in use.
        """
        with self._lock:
            registered = self._find(name)
            if self._users.get(name):
                raise CheckpointStateError(f"checkpoint {name!r} is being sent; unregister it once the update is over")
            del self._registered[name]
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
            CheckpointFormatError: a file that is used in place was truncated.
        """
        with self._lock:
            registered = self._find(name)
            self._users[name] = self._users.get(name, 0) + 1
        try:
            for segment in registered.segments:
                segment.check_file()
            yield registered
        finally:
            with self._lock:
                self._users[name] -= 1

    def close(self) -> None:
        """Frees everything, in use or not."""
        with self._lock:
            registered, self._registered = list(self._registered.values()), {}
        for checkpoint in registered:
            for segment in checkpoint.segments:
                segment.close()
        self._pool.drop_idle()

    def _find(self, name: str) -> Registered:
        if name not in self._registered:
            known = ", ".join(map(repr, self._registered)) or "none"
            raise CheckpointStateError(f"checkpoint {name!r} is not registered; registered are: {known}")
        return self._registered[name]

    def _load(
        self, name: str, files: Files, named_tensors: Mapping[str, torch.Tensor], *, in_place: bool, pooled: bool
    ) -> Registered:
        started = time.monotonic()
        selections = select(files)
        _refuse_common_names(selections, named_tensors)
        source: SegmentSource = self._pool if pooled else NewSegments()

        def fill() -> Generator[Filled, None, None]:
            yield from iterate_files(selections, in_place=in_place, source=source)
            yield from iterate_tensors(named_tensors, source=source, pin=lambda segment: segment.pin(self._device))

        with near(self._device), contextlib.closing(fill()) as filling:
            filled = self._pin_as_filled(filling)
        registered = Registered(name, [f.segment for f in filled], [f.entry for f in filled], pooled)
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
        for segment in registered.segments:
            if registered.pooled and segment.file is None:
                self._pool.give_back(segment)
            else:
                segment.close()


def _refuse_common_names(selections: list[Selection], named_tensors: Mapping[str, torch.Tensor]) -> None:
    for selection in selections:
        for tensor in selection.tensors:
            if tensor.name in named_tensors:
                raise DuplicateTensorError(
                    f"tensor {tensor.name!r} is in {selection.file.path} and again among the named tensors"
                )
