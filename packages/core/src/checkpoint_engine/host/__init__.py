"""Checkpoints in host memory: segments, what fills them, and the store that keeps them."""
