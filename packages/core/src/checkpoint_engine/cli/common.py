"""What the commands share: options, and what goes to the terminal."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

import msgspec

from checkpoint_engine.errors import SettingError
from checkpoint_engine.terminal import Json, Verbose, notes, output, print_error, print_json, verbose

__all__ = [
    "DeviceKind",
    "Json",
    "Pause",
    "ReloadChoice",
    "Verbose",
    "check_can_write",
    "encoded",
    "notes",
    "output",
    "print_error",
    "print_json",
    "verbose",
]


class Pause(str, Enum):
    """What becomes of requests that run in the engine."""

    KEEP = "keep"
    ABORT = "abort"
    WAIT = "wait"
    NONE = "none"


class ReloadChoice(str, Enum):
    """How tensors get into the engine."""

    AUTO = "auto"
    PLAN = "plan"
    LOADER = "loader"


class DeviceKind(str, Enum):
    """Where ranks bring the weights to."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def encoded(message: msgspec.Struct) -> bytes:
    """A message for the ranks.

    Raises:
        SettingError: a name in it is not text, as names of files need not be.
    """
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError as error:
        raise SettingError(
            f"{error.object!r} is not UTF-8, in which ranks and engines are told names; rename it"
        ) from None


def check_can_write(path: Path) -> None:
    """Raises unless a file can be written there, so that this is known before the work and not after it.

    Raises:
        SettingError: its directory is missing or closed to us, or it is a directory itself.
    """
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise SettingError(f"cannot write {path}: it must be a file in a directory that you may write to")
