"""Bytes that no tensor claims: a file that is something else as well, such as a ZIP archive."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors({"x": tensor(0, 16)}, bytes(16) + b"PK\x05\x06" + bytes(18)), expect=CheckpointFormatError)
