"""What can be set from the environment, under the names that existing users know."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from checkpoint_engine.errors import SettingError

__all__ = [
    "GIB",
    "MIB",
    "SECRET_FILE_VARIABLE",
    "SECRET_VARIABLE",
    "P2PSettings",
    "Settings",
    "proofs_directory",
    "rank_from_environment",
]

MIB = 1 << 20
GIB = 1 << 30
SECRET_VARIABLE = "CHECKPOINT_ENGINE_RANKS_SECRET"  # noqa: S105 - its name, not its value
"""What the ranks of a run know each other by."""
SECRET_FILE_VARIABLE = "CHECKPOINT_ENGINE_RANKS_SECRET_FILE"  # noqa: S105
"""A file that holds it."""
_DEFAULT_BUCKET_SIZE = 256 * MIB
_DEFAULT_MEM_FRACTION = 0.9
_DEFAULT_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """How an update uses device memory and which device it uses.

    Attributes:
        bucket_size: Bytes that several tensors may fill together (`PS_MAX_BUCKET_SIZE_GB`).
        mem_fraction: Share of the free device memory that staging may take (`PS_MEM_FRACTION`).
        device: `cpu`, `cuda` or `auto` (`CHECKPOINT_ENGINE_DEVICE`).
        keep_staging: Whether staging outlives an update (`PS_STAGING` is `persistent`), or is freed (`release`).
        collective: What broadcasts between ranks (`CHECKPOINT_ENGINE_COLLECTIVE`), such as `nccl` or `gloo`; `auto` for
            what suits the device.
        checksum: Whether updates compare checksums of what lies in host memory (`CHECKPOINT_ENGINE_CHECKSUM`).
    """

    bucket_size: int
    mem_fraction: float
    device: str
    keep_staging: bool = False
    collective: str = "auto"
    checksum: bool = False

    @classmethod
    def from_environment(
        cls, mem_fraction: float | None = None, device: str | None = None, staging: str | None = None
    ) -> Settings:
        """Reads the environment; arguments that are given win.

        Raises:
            SettingError: a value is not a number, out of range, or none of the words allowed.
        """
        gigabytes = _number("PS_MAX_BUCKET_SIZE_GB", _DEFAULT_BUCKET_SIZE / GIB)
        fraction = mem_fraction if mem_fraction is not None else _number("PS_MEM_FRACTION", _DEFAULT_MEM_FRACTION)
        if gigabytes <= 0:
            raise SettingError(f"PS_MAX_BUCKET_SIZE_GB is {gigabytes:g}; it must be above 0")
        if not 0 < fraction <= 1:
            raise SettingError(f"the memory fraction is {fraction:g}; it must be above 0 and at most 1")
        chosen = device or os.environ.get("CHECKPOINT_ENGINE_DEVICE", "auto")
        lifetime = staging or os.environ.get("PS_STAGING") or "release"
        if lifetime not in ("release", "persistent"):
            raise SettingError(f"PS_STAGING is {lifetime!r}; it must be release or persistent")
        collective = os.environ.get("CHECKPOINT_ENGINE_COLLECTIVE") or "auto"
        checksum = os.environ.get("CHECKPOINT_ENGINE_CHECKSUM", "0")
        if checksum not in ("", "0", "1"):
            raise SettingError(f"CHECKPOINT_ENGINE_CHECKSUM is {checksum!r}; it is 1 or 0")
        return cls(int(gigabytes * GIB), fraction, chosen, lifetime == "persistent", collective, checksum == "1")


@dataclass(frozen=True)
class P2PSettings:
    """How other hosts read this one's checkpoints, and this one theirs.

    Attributes:
        share: Whether gathered checkpoints can be read by others (`CHECKPOINT_ENGINE_P2P`).
        host: An address of this host (`CHECKPOINT_ENGINE_P2P_HOST`); found out if None.
        transport: `auto`, `rdma`, `efa` or `tcp` (`CHECKPOINT_ENGINE_P2P_TRANSPORT`).
        patience: Seconds that one read of at most 64 MiB may take (`CHECKPOINT_ENGINE_P2P_PATIENCE`).
    """

    share: bool
    host: str | None
    transport: str
    patience: float

    @classmethod
    def from_environment(cls) -> P2PSettings:
        """Reads the environment.

        Raises:
            SettingError: a value cannot work.
        """
        share = os.environ.get("CHECKPOINT_ENGINE_P2P", "0")
        transport = os.environ.get("CHECKPOINT_ENGINE_P2P_TRANSPORT", "auto")
        patience = _number("CHECKPOINT_ENGINE_P2P_PATIENCE", _DEFAULT_PATIENCE_SECONDS)
        if share not in ("", "0", "1"):
            raise SettingError(f"CHECKPOINT_ENGINE_P2P is {share!r}; it is 1 or 0")
        if transport not in ("auto", "rdma", "efa", "tcp"):
            raise SettingError(f"CHECKPOINT_ENGINE_P2P_TRANSPORT is {transport!r}; it is auto, rdma, efa or tcp")
        if not patience >= 1:
            raise SettingError(f"CHECKPOINT_ENGINE_P2P_PATIENCE is {patience:g}; it must be at least 1 second")
        host = os.environ.get("CHECKPOINT_ENGINE_P2P_HOST") or None
        return cls(share == "1", host, transport, patience)


def proofs_directory() -> Path | None:
    """Where proofs of reload plans are kept; None if `CHECKPOINT_ENGINE_PROOFS` is `off`, or there is no home.

    That variable names another directory. Otherwise it is `checkpoint-engine/proofs` in the user's cache.
    """
    named = os.environ.get("CHECKPOINT_ENGINE_PROOFS", "")
    if named == "off":
        return None
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "checkpoint-engine" / "proofs"
    except RuntimeError:  # nobody knows where this user is at home
        return None


def rank_from_environment(given: int | None, variable: str) -> int:
    """An argument if it is given, 0 included; else the environment variable that torchrun sets.

    Raises:
        SettingError: neither is there, or it is not a number.
    """
    if given is not None:
        return given
    text = os.environ.get(variable)
    if text is None:
        raise SettingError(f"{variable} is not set; start with torchrun, or pass {variable.lower()}")
    try:
        return int(text)
    except ValueError:
        raise SettingError(f"{variable} is {text!r}, which is not a whole number") from None


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SettingError(f"{variable} is {text!r}, which is not a number")
    return number
