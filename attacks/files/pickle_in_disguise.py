"""A pickle under the name of a safetensors file, hoping that somebody falls back to `torch.load`."""

import pickle
import sys
from pathlib import Path

from victim import attack

from checkpoint_engine.errors import CheckpointFormatError


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return sys.exit, ("NOT REFUSED: the pickle was executed",)


def plant(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(pickle.dumps(Payload()))


attack(plant, expect=CheckpointFormatError)
