"""A named pipe that nobody writes to, hoping that the reader waits for ever."""

import os
from pathlib import Path

from victim import attack

from checkpoint_engine.errors import CheckpointFormatError


def plant(directory: Path) -> None:
    os.mkfifo(directory / "model.safetensors")


attack(plant, expect=CheckpointFormatError)
