"""A LoRA adapter's files, as an engine's server takes them over."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from checkpoint_engine.owned_directory import OwnedDirectory
from checkpoint_engine.sdk.access import RefusedError

__all__ = ["CONFIG", "WEIGHTS", "copy_adapter", "directory_of_adapters"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's names."""
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of mode 0700 is made in it
_BAD = 400


def directory_of_adapters() -> OwnedDirectory:
    """Where a server keeps them: in memory, where there is such a place."""
    return OwnedDirectory("adapters", _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)


def copy_adapter(source: Path, target: Path) -> Path:
    """Both files, of this user, so that nobody changes them any more; if that fails, nothing is left in `target`.

    Raises:
        RefusedError: they are not there, or somebody else's.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        _copy(source, target)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError):
            raise RefusedError(_BAD, f"{source} is no LoRA adapter that can be read here: {error}") from error
        raise
    return target


def _copy(source: Path, target: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        # What is no file, as a pipe, must not be waited for.
        with os.fdopen(os.open(source / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0):
                raise RefusedError(_BAD, f"{source / name} is not a file of the user that serves")
            with (target / name).open("wb") as copy:
                shutil.copyfileobj(file, copy, 1 << 24)
