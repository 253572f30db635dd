"""Dimensions whose product is 0 in 64 bits, hoping to pass for a tensor without bytes."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors({"x": tensor(0, 0, [1 << 32, 1 << 32])}), expect=CheckpointFormatError)
