"""The names that `checkpoint_engine_vllm.sink` had before."""

from checkpoint_engine_vllm.sink import LENIENT, VllmSink

VllmAdapter = VllmSink

__all__ = ["LENIENT", "VllmAdapter"]
