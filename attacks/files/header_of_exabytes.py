"""Announces a header of 8 EiB, hoping that somebody allocates it before reading."""

from victim import attack, safetensors

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors(b"{}", length=1 << 63), expect=CheckpointFormatError)
