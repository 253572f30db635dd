"""Byte runs carried out: out of one block of memory into tensors, on a GPU or in the host's memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch

from checkpoint_engine.device.copy_calls import load_copy_calls
from checkpoint_engine.planning.byte_runs import ByteRuns

FEW_COPIES = 8
"""So many at most are queued one by one: on an H100, 4 that fill 256 MiB take 0.23 ms so, and 0.28 ms as a batch."""
_HERE = torch.device("cpu")


class PreparedCopies(Protocol):
    """Copies made ready; they can be done any number of times, out of any block."""

    def start(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Does them on the current stream of the targets' device; returns before they are done, where it can.

        Args:
            source: 1-D uint8, segment 0 of the runs: memory of the targets' device, or of the host. Unless that is
                registered with the GPU, copies out of it are slow. It must live until they are done.
            targets: In the order of the runs' numbers of targets; places count from a tensor's first element.
        """
        ...


def prepare_copies(runs: ByteRuns, device: torch.device, *, source_stays: bool, targets_stay: bool) -> PreparedCopies:
    """Makes runs out of one block of memory ready.

    Args:
        runs: All of segment 0.
        device: Where the targets are.
        source_stays: Whether the block is the same every time; what is prepared may then keep it mapped.
        targets_stay: Whether the targets are the same tensors every time.
    """
    if device.type == "cuda":
        return _CopiesToGpu(runs, device)
    return _CopiesInHost(runs, source_stays=source_stays, targets_stay=targets_stay)


class _CopiesInHost:
    """Views of bytes, copied by torch. They keep memory mapped that stays."""

    def __init__(self, runs: ByteRuns, *, source_stays: bool, targets_stay: bool) -> None:
        self._source_stays, self._targets_stay = source_stays, targets_stay
        self._runs: list[list[int]] = cast("Any", runs.table).tolist()
        self._sources: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        self._places: list[int] = []

    def start(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Copies; done when it returns."""
        sources = self._sources or self._parts_of(source)
        if self._source_stays:
            self._sources = sources
        places = [target.data_ptr() for target in targets]
        views = self._views if places == self._places else self._views_of([_bytes_of(target) for target in targets])
        if self._targets_stay:
            self._views, self._places = views, places
        if views:
            # Torch has no public name for many copies in one call, and its optimisers rely on this one.
            cast("Any", torch)._foreach_copy_(views, sources)

    def _parts_of(self, source: torch.Tensor) -> list[torch.Tensor]:
        first = int(source.storage_offset())
        return [
            source.as_strided((height, width), (pitch, 1), first + start)
            for _, start, _, _, width, height, pitch, _ in self._runs
        ]

    def _views_of(self, memory: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        return [
            memory[target][0].as_strided((height, width), (pitch, 1), memory[target][1] + place)
            for _, _, target, place, width, height, _, pitch in self._runs
        ]


class _CopiesToGpu:
    """Arrays of addresses: runs in batches, rows with the driver's own copy of rows.

    Torch would copy rows that are apart at a few GB/s out of host memory, row by row through a buffer of its own.
    """

    def __init__(self, runs: ByteRuns, device: torch.device) -> None:
        self._device = device
        self._calls = load_copy_calls()
        _, start, target, place, width, height, pitch, target_pitch = runs.table.unbind(1)
        flat = height == 1
        self._flat_targets, self._flat_places = target[flat], place[flat]
        self._flat_sources, self._flat_sizes = start[flat], width[flat].contiguous()
        self._row_targets, self._row_places, self._row_sources = target[~flat], place[~flat], start[~flat]
        rows = torch.stack((torch.zeros_like(start), target_pitch, start, pitch, width, height), 1)
        self._rows = rows[~flat]
        self._few: list[tuple[int, int, int, int]] | None = None
        """Number of the target, place in it, start in the source and bytes of each copy, if these are all there are."""
        if len(runs.table) <= FEW_COPIES and not len(self._rows):
            self._few = cast("Any", torch.stack((target, place, start, width), 1)).tolist()

    def start(self, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Queues the copies.

        Raises:
            CheckpointEngineError: the driver refuses.
        """
        bases, origin = [target.data_ptr() for target in targets], source.data_ptr()
        with torch.cuda.device(self._device):
            if self._few is not None:
                copies = ((bases[target] + place, origin + start, nbytes) for target, place, start, nbytes in self._few)
                self._calls.copy_each(copies, torch.cuda.current_stream(self._device).cuda_stream)
            else:
                self._start_batch(torch.tensor(bases, dtype=torch.int64, device=_HERE), origin)

    def _start_batch(self, bases: torch.Tensor, origin: int) -> None:
        current, own = torch.cuda.current_stream(self._device), _own_stream(self._device)
        own.wait_stream(current)
        addresses = bases[self._flat_targets] + self._flat_places
        self._calls.copy(addresses, self._flat_sources + origin, self._flat_sizes, own.cuda_stream)
        if len(self._rows):
            self._rows[:, 0] = bases[self._row_targets] + self._row_places
            self._rows[:, 2] = self._row_sources + origin
            self._calls.copy_rows(self._rows, own.cuda_stream)
        current.wait_stream(own)


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """The default stream, which engines load on, takes no batches."""
    return torch.cuda.Stream(device)


def _bytes_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor's memory as 1-D uint8, and where in it the tensor begins."""
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device=_HERE).set_(cast("Any", storage))
    return memory, tensor.data_ptr() - memory.data_ptr()
