"""Devices that weights can be brought to, behind one protocol."""

from __future__ import annotations

import torch

from checkpoint_engine.device.base import Device, Event, Lendable, Mapped, Pinned, Staging, Stream
from checkpoint_engine.device.cpu import CpuDevice
from checkpoint_engine.errors import SettingError

__all__ = ["CpuDevice", "Device", "Event", "Lendable", "Mapped", "Pinned", "Staging", "Stream", "open_device"]


def open_device(kind: str = "auto", *, index: int = 0, rank: int = 0) -> Device:
    """Opens a device.

    Args:
        kind: `cuda`, `cpu`, or `auto` for a GPU where torch sees one.
        index: Number of the GPU as torch counts them in this process.
        rank: Tells CPU devices apart.

    Raises:
        SettingError: the kind is unknown, or there is no such device.
        MissingDependencyError: the device needs a library that is not installed.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return CpuDevice(rank)
    if kind == "cuda":
        from checkpoint_engine.device.cuda import CudaDevice  # noqa: PLC0415 - not needed without a GPU

        return CudaDevice(index)
    raise SettingError(f"device {kind!r} is unknown; choose cpu, cuda or auto")
