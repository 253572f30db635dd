"""Half a million huge dimensions, hoping that somebody multiplies them."""

from victim import attack, safetensors, tensor

from checkpoint_engine.errors import UnsupportedTensorError

attack(safetensors({"x": tensor(0, 0, [(1 << 63) - 1] * 500_000)}), expect=UnsupportedTensorError)
