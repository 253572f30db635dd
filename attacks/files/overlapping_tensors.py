"""Two tensors over the same bytes: a small file that becomes a large checkpoint."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import CheckpointFormatError

attack(safetensors({"shown": tensor(0, 16), "hidden": tensor(8, 24)}, bytes(24)), expect=CheckpointFormatError)
