"""Offsets past the end of the file, hoping to read other memory as weights, or to crash the reader."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors({"x": tensor(0, 1 << 40)}, bytes(16)), expect=CheckpointFormatError)
