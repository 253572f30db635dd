"""What tells SGLang apart, and how it finds this plugin."""

from checkpoint_engine.sdk.client import EngineSign, InstalledEngine
from checkpoint_engine_sglang.installation import inspect_installation

__all__ = ["INSTALLED", "SIGN"]

SIGN = EngineSign("/model_info", "model_path")
INSTALLED = InstalledEngine(
    "sglang", "checkpoint-engine-sglang", "sglang.srt.plugins", "SGLANG_PLUGINS", inspect_installation
)
