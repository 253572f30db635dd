"""One number of a million digits, hoping for arithmetic that never ends."""

from victim import attack, safetensors

from checkpoint_engine.errors import CheckpointFormatError

header = b'{"x":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,0]}}'
attack(safetensors(header), expect=CheckpointFormatError)
