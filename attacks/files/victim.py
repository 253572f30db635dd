"""Loads a hostile checkpoint as a parameter-server rank would, and judges the outcome."""

from __future__ import annotations

import json
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_engine.device import open_device
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.source.directory import find_files
from checkpoint_engine.source.store import CheckpointStore

MOST_SECONDS = 5.0
MOST_MEMORY = 256 << 20


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with this header, which may announce any length."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    """A tensor as a header describes it."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def attack(plant: bytes | Callable[[Path], None], *, expect: type[CheckpointEngineError]) -> None:
    """Plants a file, or lets `plant` fill the directory, and registers the directory; exits if it is not refused."""
    store = CheckpointStore(open_device("cpu"))
    before, start = _peak_memory(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            if isinstance(plant, bytes):
                (directory / "model.safetensors").write_bytes(plant)
            else:
                plant(directory)
            store.register("hostile", files=find_files(directory), in_place=False)
        except expect as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            sys.exit("NOT REFUSED: the checkpoint was registered")
    seconds, taken = time.monotonic() - start, _peak_memory() - before
    if seconds > MOST_SECONDS or taken > MOST_MEMORY or store.names():
        sys.exit(f"REFUSED TOO LATE: after {seconds:.1f} s and {taken} bytes: {outcome[:300]}")
    print(f"refused within {seconds:.2f} s: {outcome[:300]}")


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
