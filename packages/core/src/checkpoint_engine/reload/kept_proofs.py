"""Proofs that outlive the process: a plan that one engine has proved need not be proved by the next of its kind.

No plan is ever read from a file. Every process records its own, from its own engine's loader; a file only says that the
very same plan, by its digest, was once compared with what the same software did to weights. So a file that is damaged,
stale, or of somebody's making can at worst not be found to fit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from checkpoint_engine.contract.fit import fingerprint
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.dtypes import dtype_name, torch_dtype
from checkpoint_engine.errors import CheckpointEngineError, CheckpointFormatError
from checkpoint_engine.settings import proofs_directory
from checkpoint_engine.version import __version__

__all__ = ["KeptProofs", "proof_files"]

_FORMAT = 1
_SUFFIX = ".proof"
_MOST = 64
"""Files that stay; the ones that were used least lately go."""
_LARGEST = 256 << 20
"""Bytes that are read of a file."""
_DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


class _KeptProof(msgspec.Struct, frozen=True, array_like=True):
    format: int
    serving: dict[str, str]
    """All that the engine's loader hangs on, and the recorder; for people as well."""
    plan: str
    """Its digest."""
    tensors: list[tuple[str, str, tuple[int, ...]]]
    """Name, dtype and shape."""


class KeptProofs:
    """Of one model of an engine worker."""

    def __init__(self, serving: Mapping[str, object], directory: Path | None = None) -> None:
        """Looks at nothing yet.

        Args:
            serving: What a proof holds for: engine, versions, device, configuration of the model, the worker's place.
            directory: Where they lie; what the environment says if None.
        """
        self._serving = {"checkpoint-engine": __version__, **{name: str(value) for name, value in serving.items()}}
        self._directory = directory or proofs_directory()
        self._fingerprint: tuple[Mapping[str, TensorSpec], str] | None = None
        """Of the tensors that were asked for last: one plan may be looked for under many digests."""
        self._kind = hashlib.sha256(msgspec.msgpack.encode(sorted(self._serving.items()))).hexdigest()[:16]

    def has(self, plan: str, tensors: Mapping[str, TensorSpec]) -> bool:
        """Whether the plan of this digest was proved, for these tensors."""
        file = self._file(plan, tensors)
        if file is None or not file.exists() or self._read(file) is None:
            return False
        with contextlib.suppress(OSError):
            os.utime(file)
        return True

    def keep(self, plan: str, tensors: Mapping[str, TensorSpec]) -> None:
        """Writes down that the plan of this digest was proved; whoever does so at the same time writes the same."""
        file = self._file(plan, tensors)
        if file is None:
            return
        try:
            listed = [(name, dtype_name(spec.dtype), tuple(spec.shape)) for name, spec in tensors.items()]
            body = msgspec.msgpack.encode(_KeptProof(_FORMAT, self._serving, plan, listed))
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=_SUFFIX)  # of mode 0600
            try:
                with os.fdopen(descriptor, "wb") as opened:
                    opened.write(hashlib.sha256(body).digest() + body)
                Path(name).replace(file)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            _leave_the_newest(file.parent)
        except (OSError, CheckpointEngineError) as error:
            _log.warning("the proof of the reload plan is not kept for the next engine: %s", error)

    def forget(self, plan: str, tensors: Mapping[str, TensorSpec]) -> None:
        """The plan of this digest did not hold what the proof says."""
        file = self._file(plan, tensors)
        if file is not None:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def last(self) -> Mapping[str, TensorSpec] | None:
        """The tensors that engines of this kind got lately; None if nothing is known."""
        for file in proof_files(self._directory):
            if file.name.startswith(self._kind):
                found = self._read(file)
                if found is not None:
                    return _specs(found)
        return None

    def _file(self, plan: str, tensors: Mapping[str, TensorSpec]) -> Path | None:
        if self._directory is None:
            return None
        known = self._fingerprint
        if known is None or known[0] is not tensors:
            self._fingerprint = known = tensors, fingerprint(tensors)
        key = hashlib.sha256(f"{plan}{known[1]}".encode()).hexdigest()
        return self._directory / f"{self._kind}-{key[:32]}{_SUFFIX}"

    def _read(self, file: Path) -> _KeptProof | None:
        """What a file says, if it is whole, ours, and of this kind; else None, and the log says why."""
        try:
            found = _decode(_bytes_of(file))
            if found.serving != self._serving or file != self._file(found.plan, _specs(found)):
                raise CheckpointFormatError("it is of something else than its name says")
        except (OSError, msgspec.MsgspecError, CheckpointEngineError) as error:
            _log.warning("the kept proof %s is not used, and will be replaced: %s", file, error)
            return None
        return found


def _bytes_of(file: Path) -> bytes:
    """What a file holds that nobody but this user can have written."""
    for path in (file.parent, file):
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CheckpointFormatError(f"{path} could be written by others")
    with file.open("rb") as opened:
        return opened.read(_LARGEST)


def _decode(text: bytes) -> _KeptProof:
    digest, body = text[:_DIGEST_BYTES], text[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointFormatError("it is damaged")
    found = msgspec.msgpack.decode(body, type=_KeptProof)
    if found.format != _FORMAT:
        raise CheckpointFormatError(f"it is of format {found.format}, and this version reads {_FORMAT}")
    return found


def proof_files(directory: Path | None) -> list[Path]:
    """All that are kept in a directory, what was used last first."""
    if directory is None:
        return []
    dated = list[tuple[float, Path]]()
    with contextlib.suppress(OSError):
        dated = [(_date(file), file) for file in _entries(directory)]
    return [file for _, file in sorted(dated, reverse=True)]


def _entries(directory: Path) -> Iterator[Path]:
    return (file for file in directory.iterdir() if file.suffix == _SUFFIX and not file.name.startswith("."))


def _date(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0


def _leave_the_newest(directory: Path) -> None:
    for file in proof_files(directory)[_MOST:]:
        file.unlink(missing_ok=True)


def _specs(found: _KeptProof) -> dict[str, TensorSpec]:
    return {name: TensorSpec(torch_dtype(dtype), shape) for name, dtype, shape in found.tensors}
