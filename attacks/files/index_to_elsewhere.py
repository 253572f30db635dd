"""An index that names a file outside its directory, hoping to have somebody else's weights read."""

import json
from pathlib import Path

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError


def plant(directory: Path) -> None:
    secret = directory / "secret"
    secret.mkdir()
    (secret / "x.safetensors").write_bytes(safetensors({"x": tensor(0, 4)}, bytes(4)))
    index = {"weight_map": {"x": "secret/../secret/x.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


attack(plant, expect=CheckpointFormatError)
