"""Truncates the file while its data is being read, hoping for SIGBUS or for zeros as weights."""

import os
import threading
from pathlib import Path

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

content = safetensors({"x": tensor(0, 64 << 20)}, b"w" * (64 << 20))
read = os.preadv


def plant(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    cut = threading.Event()

    def cut_then_read(descriptor: int, buffers: list[memoryview], position: int) -> int:
        if not cut.is_set():
            cut.set()
            os.truncate(path, 1 << 20)
        return read(descriptor, buffers, position)

    os.preadv = cut_then_read


try:
    attack(plant, expect=CheckpointFormatError)
finally:
    os.preadv = read
