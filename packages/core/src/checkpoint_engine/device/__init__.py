"""Devices that weights can be brought to, behind one protocol."""

from __future__ import annotations

from checkpoint_engine.device.base import (
    Device,
    DeviceType,
    Event,
    ExportedMemory,
    Mapped,
    Pinned,
    PreparedCopies,
    Staging,
    Stream,
)
from checkpoint_engine.device.cpu import CpuDevice
from checkpoint_engine.device.types import (
    DEVICE_TYPES,
    accelerator_count,
    accelerators,
    default_type,
    open_device,
    prepare_copies,
    type_of,
)

__all__ = [
    "DEVICE_TYPES",
    "CpuDevice",
    "Device",
    "DeviceType",
    "Event",
    "ExportedMemory",
    "Mapped",
    "Pinned",
    "PreparedCopies",
    "Staging",
    "Stream",
    "accelerator_count",
    "accelerators",
    "default_type",
    "open_device",
    "prepare_copies",
    "type_of",
]
