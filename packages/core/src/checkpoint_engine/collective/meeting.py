"""Where the ranks meet: a Unix socket that only their user reaches, or an address to which only their secret opens."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, cast

import zmq

from checkpoint_engine.collective.curve import CurveKeys
from checkpoint_engine.errors import AccessRefusedError, AddressInUseError, RankError, SettingError
from checkpoint_engine.owned_directory import temporary_root
from checkpoint_engine.settings import SECRET_FILE_VARIABLE, SECRET_VARIABLE

__all__ = ["BetweenHosts", "Meeting", "OnThisHost", "is_of_this_host", "needs_secret"]

_POLL_SECONDS = 0.02
_LOCK_TRIES = 25
_LONGEST_PATH = 100
"""Of a Unix socket the kernel takes 107 bytes."""


class Meeting(Protocol):
    """A place that rank 0 opens, and where the others look for it."""

    where: str
    """For people."""

    def listen(self, hub: zmq.Socket[bytes]) -> CurveKeys:
        """Opens the place, to those who have the keys that it returns.

        Raises:
            AddressInUseError: somebody else has opened it.
            SettingError: it cannot be opened here.
        """
        ...

    def approach(self, rank: zmq.Socket[bytes]) -> None:
        """Begins to connect.

        Raises:
            RankError: rank 0 has not opened it yet, as far as can be seen from here.
            SettingError: it never will be.
        """
        ...

    def close(self) -> None:
        """Closes what `listen` opened."""
        ...


class OnThisHost:
    """A socket in a directory of mode 0700, beside a file of mode 0600 with the run's secret, which rank 0 makes.

    The file is locked for as long as rank 0 lives: what a dead one left is neither believed nor kept.
    """

    def __init__(self, name: str, rank: int, host: str, port: int, secret: bytes) -> None:
        """A place for all runs of this user that call it so; with a secret of the launcher, for one of them.

        Args:
            name: Of the run.
            rank: Who comes.
            host: Where rank 0 is said to be; empty where it is known to be here.
            port: As far as rank 0 has one, for messages.
            secret: Of the launcher, or nothing.
        """
        self._purpose = name
        self._rank = rank
        self._host = host
        self._port = port
        self._secret = secret
        self._directory = Path(temporary_root(), f"checkpoint-engine-ranks-{os.geteuid()}")
        self._stem = blake2b(name.encode(), key=blake2b(secret).digest(), digest_size=12).hexdigest()
        self._lock: int | None = None
        self._handle: int | None = None
        self.where = f"{self._directory}/{self._stem}"

    def listen(self, hub: zmq.Socket[bytes]) -> CurveKeys:
        """Makes the secret, the directory if need be, and the socket."""
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise SettingError(
                f"cannot make {self._directory}, where ranks meet: {error.strerror}; set TMPDIR to a writable directory"
            ) from error
        self._check_directory()
        _sweep(self._directory)
        self._lock = self._take_lock()
        made = secrets.token_bytes(32)
        keys = self._keys(made)
        keys.arm_hub(hub)
        hub.bind(f"ipc://{self._socket_path()}")
        os.pwrite(self._lock, made, 0)  # who reads it finds a socket
        return keys

    def approach(self, rank: zmq.Socket[bytes]) -> None:
        """Reads the secret, if its owner lives."""
        try:
            made = self._read_made()
        except RankError:
            if self._host and not is_of_this_host(self._host):
                raise needs_secret(self._rank, self._host) from None
            raise
        self._keys(made).arm_rank(rank)
        rank.connect(f"ipc://{self._socket_path()}")

    def close(self) -> None:
        """Removes all of it."""
        if self._lock is not None:
            _remove(self._directory / self._stem)
            os.close(self._lock)
        if self._handle is not None:
            os.close(self._handle)
        self._lock = self._handle = None

    def _keys(self, made: bytes) -> CurveKeys:
        return CurveKeys.of(made + self._secret, self._purpose)

    def _check_directory(self) -> None:
        found = self._directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise AccessRefusedError(
                f"{self._directory} is not a directory of this user alone: remove it, or set TMPDIR on all ranks"
            )

    def _socket_path(self) -> str:
        path = f"{self._directory}/{self._stem}.socket"
        if len(path) <= _LONGEST_PATH:
            return path
        if self._handle is None:
            self._handle = os.open(self._directory, os.O_PATH | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._handle}/{self._stem}.socket"

    def _take_lock(self) -> int:
        path = self._directory / self._stem
        for _ in range(_LOCK_TRIES):  # whoever only looks whether it is locked holds it for a moment
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if _lock(lock) and _same_file(lock, path):
                os.ftruncate(lock, 0)
                return lock
            os.close(lock)
            time.sleep(_POLL_SECONDS)
        raise AddressInUseError(
            f"port {self._port} is in use: another rank 0 of this user lives on this host with that MASTER_PORT; set "
            "MASTER_PORT (or master_port) to a free port"
        )

    def _read_made(self) -> bytes:
        try:
            self._check_directory()
            file = os.open(self._directory / self._stem, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise RankError("no rank 0 of this user waits on this host with this MASTER_PORT") from None
        try:
            made = os.read(file, 64)
            if _lock(file) or not made:
                raise RankError("the rank 0 that waited on this host with this MASTER_PORT is gone")
            return made
        finally:
            os.close(file)


class BetweenHosts:
    """The address of rank 0, and no other of its host; keys are made of the secret that the launcher has given."""

    def __init__(
        self, name: str, host: str, port: int, secret: bytes, hint: Callable[[int | None], int | None]
    ) -> None:
        """A place.

        Args:
            name: Of the run among those that have the same secret.
            host: Name or address of rank 0.
            port: Where it listens; 0 where that port is another's, and `hint` tells.
            secret: What all ranks have been given.
            hint: Tells others the port, or asks for it with None. Not believed: who answers there shows the keys.
        """
        self._keys = CurveKeys.of(secret, name)
        self._host = host
        self._port = port
        self._hint = hint
        self.where = f"{host}:{port}" if port else host

    def listen(self, hub: zmq.Socket[bytes]) -> CurveKeys:
        """Binds the address."""
        self._keys.arm_hub(hub)
        address = _resolve(self._host)
        hub.ipv6 = ":" in address
        try:
            hub.bind(_endpoint(address, self._port))
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"port {self._port} on {self._host} is in use; set MASTER_PORT (or master_port) to a free port"
                ) from error
            raise SettingError(
                f"rank 0 cannot listen on {self._host} ({address}): {error.strerror}; MASTER_ADDR is to be an address "
                "of its own host"
            ) from error
        if not self._port:
            endpoint = cast("bytes", hub.getsockopt(zmq.LAST_ENDPOINT))
            self._hint(int(endpoint.rstrip(b"\0").rpartition(b":")[2]))
        return self._keys

    def approach(self, rank: zmq.Socket[bytes]) -> None:
        """Connects to the address."""
        port = self._port or self._hint(None)
        if port is None:
            raise RankError("rank 0 has not said yet on which port it listens")
        address = _resolve(self._host)
        rank.ipv6 = ":" in address
        self._keys.arm_rank(rank)
        rank.connect(_endpoint(address, port))

    def close(self) -> None:
        """There is nothing but the socket."""


def _resolve(host: str) -> str:
    """The address of a host.

    Raises:
        RankError: it has none, for now at least.
    """
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise RankError(f"MASTER_ADDR (or master_addr) {host!r} cannot be resolved: {error}") from error


def is_of_this_host(host: str) -> bool:
    """Whether that is an address of this host.

    Raises:
        RankError: the name has no address.
    """
    address = _resolve(host)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def needs_secret(rank: int, host: str) -> SettingError:
    """Ranks of several hosts have none."""
    return SettingError(
        f"rank {rank} and other ranks are on different hosts (MASTER_ADDR is {host}), and ranks of several hosts know "
        f"each other by a secret: set {SECRET_VARIABLE} on all of them to the output of one `openssl rand -hex 32`, or "
        f"{SECRET_FILE_VARIABLE} to a file of mode 0600 that holds it"
    )


def _endpoint(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port or '*'}" if ":" in address else f"tcp://{address}:{port or '*'}"


def _sweep(directory: Path) -> None:
    """Removes what ranks left that are dead."""
    for path in directory.iterdir():
        if path.suffix:
            continue
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        if _lock(file) and _same_file(file, path):
            _remove(path)
        os.close(file)


def _remove(path: Path) -> None:
    path.with_suffix(".socket").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False
