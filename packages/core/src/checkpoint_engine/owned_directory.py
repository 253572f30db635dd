"""Temporary directories that end with their owner, or with the next start after it has died."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from checkpoint_engine.errors import SettingError

__all__ = ["OwnedDirectory", "temporary_root"]

_TRIES = 5
_swept: set[tuple[Path, str]] = set()


def temporary_root() -> Path:
    """Where temporary files go.

    Raises:
        SettingError: nowhere can be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise SettingError(f"{error}; set TMPDIR to a directory that can be written to") from error


class OwnedDirectory:
    """A directory of mode 0700, locked for as long as its owner lives.

    The lock ends with the owner, however that ends: the first directory of that kind that another process makes takes
    away what dead ones of the same user have left.
    """

    def __init__(self, kind: str, parent: Path | None = None) -> None:
        """Makes it, as `checkpoint-engine-KIND-…`.

        Raises:
            SettingError: it cannot be made.
        """
        parent = parent or temporary_root()
        prefix = f"checkpoint-engine-{kind}-"
        if (parent, prefix) not in _swept:
            _swept.add((parent, prefix))
            _sweep(parent, prefix)
        try:
            self.path, self._lock = _make(parent, prefix)
        except OSError as error:
            raise SettingError(
                f"cannot make a directory in {parent}: {error.strerror}; set TMPDIR to a short, writable path"
            ) from error

    def close(self) -> None:
        """Removes it, with all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(path)
        if lock is not None:
            return path, lock
    raise OSError(0, "others remove what is made there")


def _sweep(parent: Path, prefix: str) -> None:
    """Removes directories of this user that nobody holds."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{prefix}*"):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """Holds a directory; None if somebody else does, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
