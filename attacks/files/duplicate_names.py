"""The same key twice: two readers of one file would take different weights."""

from victim import attack, safetensors

from checkpoint_engine.errors import CheckpointFormatError

one = b'"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
two = b'"x":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}'
attack(safetensors(b"{" + one + b"," + two + b"}", bytes(8)), expect=CheckpointFormatError)
