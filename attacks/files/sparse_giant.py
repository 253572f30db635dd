"""A sparse file of 8 TiB that takes no disk space, hoping that the host runs out of memory."""

import json
from pathlib import Path

from victim import attack, tensor

from checkpoint_engine.errors import HostMemoryError

GIB = 1 << 30


def plant(directory: Path) -> None:
    header = json.dumps({f"x{i}": tensor(i * 32 * GIB, (i + 1) * 32 * GIB) for i in range(256)}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 256 * 32 * GIB)


attack(plant, expect=HostMemoryError)
