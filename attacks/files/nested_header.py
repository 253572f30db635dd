"""A header of two million brackets, hoping that the parser's stack runs over."""

from victim import attack, safetensors

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors(b'{"x":' + b"[" * 2_000_000), expect=CheckpointFormatError)
