"""Announces a header that is longer than the file, hoping for a read past the end."""

from victim import attack, safetensors

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors(b"{}", length=99_000_000), expect=CheckpointFormatError)
