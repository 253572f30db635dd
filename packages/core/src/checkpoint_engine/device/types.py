"""The types of device that there are. A new one is a class in a file of its own, and stands in this table."""

from __future__ import annotations

import torch

from checkpoint_engine.device.base import Device, DeviceType, PreparedCopies
from checkpoint_engine.device.cpu import CpuType
from checkpoint_engine.device.cuda import CudaType
from checkpoint_engine.errors import SettingError
from checkpoint_engine.planning.byte_runs import ByteRuns

__all__ = [
    "DEVICE_TYPES",
    "accelerator_count",
    "accelerators",
    "default_type",
    "open_device",
    "prepare_copies",
    "type_of",
]

_HOST = CpuType()
_ACCELERATORS: tuple[DeviceType, ...] = (CudaType(),)
"""`auto` is the first that this process sees."""

DEVICE_TYPES = {device_type.name: device_type for device_type in (*_ACCELERATORS, _HOST)}


def accelerators() -> tuple[DeviceType, ...]:
    """What this process sees, besides the host."""
    return tuple(device_type for device_type in _ACCELERATORS if device_type.count())


def default_type() -> DeviceType:
    """An accelerator where this process sees one, else the host."""
    return next(iter(accelerators()), _HOST)


def accelerator_count() -> int:
    """Accelerators of the default type that this process sees; 0 where there is nothing but the host."""
    return sum(device_type.count() for device_type in accelerators()[:1])


def type_of(device: torch.device | str) -> DeviceType:
    """What a device of torch is, by its type or the name of that.

    Raises:
        SettingError: it is unknown.
    """
    name = device if isinstance(device, str) else device.type
    if name not in DEVICE_TYPES:
        raise SettingError(f"device {name!r} is unknown; known are {', '.join(sorted(DEVICE_TYPES))}")
    return DEVICE_TYPES[name]


def open_device(kind: str = "auto", *, index: int = 0, rank: int = 0) -> Device:
    """Opens a device.

    Args:
        kind: `cuda`, `cpu`, or `auto` for a GPU where torch sees one.
        index: Number of the device as torch counts them in this process.
        rank: Tells CPU devices apart.

    Raises:
        SettingError: the kind is unknown, or there is no such device.
        MissingDependencyError: the device needs a library that is not installed.
    """
    return (default_type() if kind == "auto" else type_of(kind)).open(index, rank)


def prepare_copies(runs: ByteRuns, device: torch.device, *, source_stays: bool, targets_stay: bool) -> PreparedCopies:
    """Makes runs ready.

    Args:
        runs: Out of any number of segments.
        device: Where the targets are.
        source_stays: Whether the blocks are the same every time; what is prepared may then keep them mapped.
        targets_stay: Whether the targets are the same tensors every time.

    Raises:
        SettingError: the device is unknown.
    """
    return type_of(device).prepare_copies(runs, device, source_stays=source_stays, targets_stay=targets_stay)
