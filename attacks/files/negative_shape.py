"""Two negative dimensions, whose product looks right."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors({"x": tensor(0, 16, [-4, -4])}, bytes(16)), expect=CheckpointFormatError)
