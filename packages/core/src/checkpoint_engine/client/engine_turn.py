"""Whose turn it is to update an engine, and who has paused it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from typing_extensions import Self

from checkpoint_engine.client.endpoint import with_scheme
from checkpoint_engine.contract.pause import note_pause
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError

__all__ = ["EngineTurn"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_PAUSED, _OTHERS = b"paused ", b"others "


class EngineTurn:
    """The right to update one engine: of one update at a time, among all senders of this user on this host.

    It is a lock on a file, so it ends with its owner, however that ends. The file remembers whether one of us has
    paused the engine and has not resumed it, as long as this host is up. Senders of other hosts are not seen.
    """

    def __init__(self, address: str) -> None:
        """That of the engine at this address, as `client.endpoint.Endpoint` has it."""
        self._address = address
        self._file = -1
        self.paused = False
        """Whether an update, not a person, has paused the engine and not resumed it: this one, or one before it."""
        self.paused_by_others = False
        """Whether somebody else had paused it when an update came last, which left it so."""
        self.steps_elsewhere = False
        """Whether replicas behind other endpoints take each step with it: it is resumed with them, or not at all."""
        self.pausing: float | None = None
        """When this update has paused it (of `time.perf_counter`)."""

    def take(self, deadline: Deadline) -> Self:
        """Waits for it.

        Raises:
            DeadlineError: another update of the engine is not over in time.
        """
        try:
            self._file = _open(self._address)
        except OSError as error:
            logger.warning("updates of %s cannot be kept from each other: %s", self._address, error)
            return self
        while not _locked(self._file):
            if deadline.expired:
                owner = self._read().rpartition(b" ")[2].decode() or "?"
                os.close(self._file)
                self._file = -1
                raise DeadlineError(
                    f"{self._address} is being updated by process {owner}, which was not over within "
                    f"{deadline.said}; an engine has one updater at a time"
                )
            time.sleep(min(_POLL_SECONDS, deadline.remaining))
        found = self._read()
        self.paused, self.paused_by_others = found.startswith(_PAUSED), found.startswith(_OTHERS)
        self._write()
        return self

    def note_pause(self) -> None:
        """Remembers that the engine is about to be paused by an update."""
        self.paused, self.paused_by_others, self.pausing = True, False, time.perf_counter()
        self._write()

    def note_pause_of_others(self) -> None:
        """Remembers that it is paused, and not by an update."""
        self.paused_by_others = True
        self._write()

    def note_resume(self) -> None:
        """Remembers that it has been resumed, and says for how long this update has paused it."""
        self.paused = self.paused_by_others = False
        self._write()
        if self.pausing is not None:
            note_pause(time.perf_counter() - self.pausing)

    def give_back(self) -> None:
        """The next one's turn."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def _read(self) -> bytes:
        return os.pread(self._file, 64, 0)

    def _write(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):  # a full disk must not end an update
                os.ftruncate(self._file, 0)
                state = _PAUSED if self.paused else _OTHERS if self.paused_by_others else b"open "
                os.pwrite(self._file, state + str(os.getpid()).encode(), 0)


def _open(address: str) -> int:
    directory = Path(tempfile.gettempdir(), f"checkpoint-engine-engines-{os.geteuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(f"{directory} is not this user's")
    name = hashlib.sha256(_canonical(address).encode()).hexdigest()[:24]
    return os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _canonical(address: str) -> str:
    """The same for all names of one engine, as far as that can be told."""
    parts = urlsplit(with_scheme(address))
    if parts.scheme == "unix":
        return f"unix:{os.path.realpath(parts.path)}"
    if parts.hostname is None:
        return address  # of an engine in a process, which has one name
    host = parts.hostname
    with contextlib.suppress(OSError):
        host = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    return f"{'this host' if host.startswith(('127.', '0.')) else host}:{parts.port}"


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
