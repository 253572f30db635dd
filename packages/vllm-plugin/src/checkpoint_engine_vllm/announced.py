"""What tells vLLM apart, and how it finds this plugin."""

from checkpoint_engine.sdk.client import EngineSign, InstalledEngine

__all__ = ["INSTALLED", "SIGN"]

SIGN = EngineSign("/version", "version")
INSTALLED = InstalledEngine("vllm", "checkpoint-engine-vllm", "vllm.general_plugins", "VLLM_PLUGINS")
