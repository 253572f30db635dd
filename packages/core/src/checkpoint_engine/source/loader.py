"""Brings checkpoints into segments: from `.safetensors` files, or from tensors in memory."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import torch

from checkpoint_engine.catalog import SegmentEntry, TensorEntry
from checkpoint_engine.device import DEVICE_TYPES, type_of
from checkpoint_engine.dtypes import dtype_name
from checkpoint_engine.errors import (
    CheckpointFormatError,
    DuplicateTensorError,
    SettingError,
    UnsupportedTensorError,
)
from checkpoint_engine.source.copies_in_files import is_same_in_files
from checkpoint_engine.source.copying import comes_from_a_device, copy_into
from checkpoint_engine.source.filling import (
    Filled,
    NewSegments,
    Placement,
    SegmentSource,
    assign_segments,
    read_into,
    touch_all,
    workers,
)
from checkpoint_engine.source.plain_data import require_data
from checkpoint_engine.source.safetensors_file import Opener, SafetensorsFile, read_header
from checkpoint_engine.source.segment import LARGEST_SEGMENT, Segment

__all__ = [
    "Files",
    "Selection",
    "iterate_files",
    "iterate_tensors",
    "keep",
    "load_files",
    "load_tensors",
    "require_carriable",
    "select",
    "split_among_ranks",
]

_MOUNTS = Path("/proc/self/mountinfo")
_LARGEST_GAP = 16 << 20
"""Bytes between two wanted tensors of a mapped file beyond which they are mapped apart."""
_NEW = NewSegments()

Files = Sequence[str | Path] | Mapping[Path, Collection[str] | None]
"""Files, or for each file the names of the tensors to take from it, None for all; a mapping says what each shall be
called."""


@dataclass(frozen=True)
class Selection:
    """A file, and those of its tensors that are wanted, in the order of the file."""

    file: SafetensorsFile
    tensors: tuple[TensorEntry, ...]


def keep(selection: Selection, names: Collection[str]) -> Selection:
    """The same file, and of its tensors those that have one of these names."""
    return Selection(selection.file, tuple(tensor for tensor in selection.tensors if tensor.name in names))


def split_among_ranks(selections: Iterable[Selection], world_size: int) -> list[dict[Path, tuple[str, ...]]]:
    """Gives each rank a run of whole tensors, about the same number of bytes for all.

    Raises:
        SettingError: there are no ranks.
    """
    if world_size < 1:
        raise SettingError(f"a checkpoint cannot be split among {world_size} ranks")
    wanted = [(selection.file.path, tensor) for selection in selections for tensor in selection.tensors]
    total = sum(tensor.nbytes for _, tensor in wanted)
    parts: list[dict[Path, list[str]]] = [{} for _ in range(world_size)]
    before = 0
    for path, tensor in wanted:
        middle = 2 * before + tensor.nbytes
        rank = min(world_size - 1, middle * world_size // (2 * total)) if total else 0
        parts[rank].setdefault(path, []).append(tensor.name)
        before += tensor.nbytes
    return [{path: tuple(names) for path, names in part.items()} for part in parts]


def select(files: Files, opener: Opener = os.open) -> list[Selection]:
    """Reads the headers and picks the tensors.

    Raises:
        CheckpointFormatError: a file is missing or broken, or lacks a tensor that is asked for.
        DuplicateTensorError: two files hold other tensors under one name.
        UnsupportedTensorError: a tensor cannot be carried.
        SettingError: these are no paths.
    """
    if isinstance(files, (str, bytes, os.PathLike)):
        raise SettingError(f"files is {files!r}; it is a list of paths: files=[{files!r}]")
    wanted: Mapping[Path, Collection[str] | None]
    wanted = {Path(path): names for path, names in files.items()} if isinstance(files, Mapping) else _all_of(files)
    selections = [_pick(read_header(path, opener), names) for path, names in wanted.items()]
    seen: dict[str, tuple[SafetensorsFile, TensorEntry]] = {}
    return [Selection(each.file, tuple(t for t in each.tensors if _is_new(each.file, t, seen))) for each in selections]


def _is_new(file: SafetensorsFile, tensor: TensorEntry, seen: dict[str, tuple[SafetensorsFile, TensorEntry]]) -> bool:
    """Whether a tensor is to be taken from this file; not if another has it already, byte for byte."""
    other, before = seen.setdefault(tensor.name, (file, tensor))
    if before is tensor:
        return True
    if not is_same_in_files(other, before, file, tensor):
        raise DuplicateTensorError(
            f"tensor {tensor.name!r} is in {other.path} and again in {file.path}, with other bytes"
        )
    return False


def load_files(files: Files, *, in_place: bool = True, source: SegmentSource = _NEW) -> list[Filled]:
    """Brings files into segments; see `iterate_files`.

    Raises:
        CheckpointEngineError: as `select` and `iterate_files`; all segments are freed.
    """
    return _collect(iterate_files(select(files), in_place=in_place, source=source))


def load_tensors(named_tensors: Mapping[str, torch.Tensor], *, source: SegmentSource = _NEW) -> list[Filled]:
    """Copies tensors into segments; see `iterate_tensors`.

    Raises:
        CheckpointEngineError: as `iterate_tensors`; all segments are freed.
    """
    return _collect(iterate_tensors(named_tensors, source=source))


def iterate_files(
    selections: Sequence[Selection], *, in_place: bool = True, source: SegmentSource = _NEW
) -> Iterator[Filled]:
    """Yields segments as they are filled; the caller closes them.

    Files that lie in memory already (tmpfs, such as /dev/shm) are mapped where they are, and their tensors keep
    the distances of the file. Others are read with parallel `preadv` straight into segments.

    Raises:
        CheckpointFormatError: a file changed meanwhile.
        HostMemoryError: memory is short.
    """
    memory_filesystems = _memory_filesystems() if in_place else frozenset[int]()
    to_read: list[tuple[SafetensorsFile, TensorEntry]] = []
    for selection in selections:
        file = selection.file
        # Pinning needs a mapping that can be written to; who may only read the file gets a copy.
        if file.stamp[0] in memory_filesystems and os.access(file.path, os.W_OK):
            for run in _runs(selection.tensors):
                yield _map_in_place(file, run)
        else:
            to_read.extend((file, tensor) for tensor in selection.tensors)

    def fill(pool: ThreadPoolExecutor, placement: Placement) -> None:
        part = to_read[placement.first : placement.first + len(placement.tensors)]
        read_into(pool, placement, [(file, file.data_start + tensor.offset) for file, tensor in part])

    yield from _fill([tensor for _, tensor in to_read], source, fill)


def iterate_tensors(
    named_tensors: Mapping[str, torch.Tensor],
    *,
    source: SegmentSource = _NEW,
    pin: Callable[[Segment], None] | None = None,
) -> Iterator[Filled]:
    """Yields segments as they are filled; the caller closes them. Any strides, any storage, any device will do.

    Args:
        named_tensors: What to copy.
        source: Where segments come from.
        pin: Registers a segment with the driver. That is done before anything comes from a GPU, which then writes to
            it directly; otherwise it is left to the caller.

    Raises:
        UnsupportedTensorError: a tensor's dtype or layout cannot be carried, or it has no data.
        HostMemoryError: memory is short.
    """
    entries = [_entry_of(name, tensor) for name, tensor in named_tensors.items()]
    for device in {tensor.device for tensor in named_tensors.values()}:
        # Our threads know nothing of the stream on which the caller computed them.
        type_of(device).synchronize(device)
    tensors = [tensor.detach() for tensor in named_tensors.values()]

    def fill(pool: ThreadPoolExecutor, placement: Placement) -> None:
        part = tensors[placement.first : placement.first + len(placement.tensors)]
        if pin is not None and any(comes_from_a_device(tensor) for tensor in part):
            touch_all(pool, placement)
            pin(placement.segment)
        copy_into(pool, placement, part)

    yield from _fill(entries, source, fill)


def require_carriable(named_tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises unless all of them can be registered; nothing is copied.

    Raises:
        UnsupportedTensorError: a tensor's dtype, layout or device cannot be carried, or it has no data.
    """
    for name, tensor in named_tensors.items():
        _entry_of(name, tensor)


def _collect(filling: Iterator[Filled]) -> list[Filled]:
    filled: list[Filled] = []
    try:
        filled.extend(filling)
    except BaseException:
        for done in filled:
            done.segment.discard()
        raise
    return filled


def _fill(
    tensors: Sequence[TensorEntry], source: SegmentSource, fill: Callable[[ThreadPoolExecutor, Placement], None]
) -> Iterator[Filled]:
    with workers() as pool:
        for placement in assign_segments(tensors, source):
            try:
                fill(pool, placement)
            except BaseException:
                placement.segment.discard()
                raise
            yield placement.filled()


def _runs(tensors: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Neighbours that one mapping can hold."""
    run: list[TensorEntry] = []
    for tensor in tensors:
        end = tensor.offset + tensor.nbytes
        if run:
            gap = tensor.offset - (run[-1].offset + run[-1].nbytes)
            # A page of slack: the mapping begins at a page, and the header is in front.
            if gap > _LARGEST_GAP or end - run[0].offset > LARGEST_SEGMENT - mmap.PAGESIZE:
                yield run
                run = []
        run.append(tensor)
    if run:
        yield run


def _map_in_place(file: SafetensorsFile, run: Sequence[TensorEntry]) -> Filled:
    start = file.data_start + run[0].offset
    end = file.data_start + run[-1].offset + run[-1].nbytes
    with file.open():
        segment = Segment.map_file(file.path, start, end)
    try:
        file.check_unchanged(segment.fd)
    except CheckpointFormatError:
        segment.close()
        raise
    shift = file.data_start - segment.file_start
    tensors = tuple(TensorEntry(t.name, t.dtype, t.shape, t.offset + shift) for t in run)
    return Filled(segment, SegmentEntry(segment.nbytes, tensors, segment.address))


def _memory_filesystems() -> frozenset[int]:
    """The device numbers of all mounted tmpfs."""
    devices: set[int] = set()
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text().splitlines():
            mount, _, filesystem = line.partition(" - ")
            if filesystem.startswith("tmpfs "):
                major, minor = mount.split()[2].split(":")
                devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)


def _entry_of(name: str, tensor: torch.Tensor) -> TensorEntry:
    if hasattr(tensor, "full_tensor"):
        raise UnsupportedTensorError(f"tensor {name!r} is distributed in a way that is not known; give TensorShards")
    require_data(name, tensor)
    if tensor.device.type not in DEVICE_TYPES:
        known = ", ".join(sorted(DEVICE_TYPES))
        raise UnsupportedTensorError(f"tensor {name!r} lies on {tensor.device}; known devices are {known}")
    try:
        return TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape), 0)
    except UnsupportedTensorError as error:
        raise UnsupportedTensorError(f"tensor {name!r}: {error}") from None


def _all_of(files: Sequence[str | Path]) -> Mapping[Path, Collection[str] | None]:
    wanted: dict[Path, Collection[str] | None] = {}
    for path in files:
        if Path(path) in wanted:
            raise DuplicateTensorError(f"the file {path} is given twice")
        wanted[Path(path)] = None
    return wanted


def _pick(file: SafetensorsFile, names: Collection[str] | None) -> Selection:
    if names is None:
        return Selection(file, file.tensors)
    asked = set(names)
    tensors = tuple(tensor for tensor in file.tensors if tensor.name in asked)
    if len(tensors) < len(asked):
        lacking = sorted(asked - {tensor.name for tensor in tensors})
        raise CheckpointFormatError(f"{file.path} lacks {_some(lacking)}")
    if isinstance(names, Mapping):
        called = cast("Mapping[str, str]", names)
        tensors = tuple(msgspec.structs.replace(tensor, name=called[tensor.name]) for tensor in tensors)
    return Selection(file, tensors)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
