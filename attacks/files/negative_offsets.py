"""Offsets in front of the data, hoping to read the header, or other memory, as weights."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors({"x": tensor(-16, 0)}, bytes(16)), expect=CheckpointFormatError)
