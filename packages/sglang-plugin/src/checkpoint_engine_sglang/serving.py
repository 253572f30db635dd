"""What a model's plans hang on, besides the tensors that come: what a proof of one of them is kept under."""

from __future__ import annotations

import hashlib
import json

import torch

from checkpoint_engine_sglang import __version__
from checkpoint_engine_sglang.compat import Runner
from checkpoint_engine_sglang.installation import version

__all__ = ["serving"]

_OF_NO_WEIGHT = ("_name_or_path", "name_or_path", "transformers_version")
"""Parts of a model's configuration that say nothing of it."""


def serving(runner: Runner, place: str) -> dict[str, object]:
    """Versions, device, configuration, and the worker's place among the others."""
    parts = dict(runner.hf_config.to_dict()) if hasattr(runner.hf_config, "to_dict") else {"path": runner.path}
    for name in _OF_NO_WEIGHT:
        parts.pop(name, None)
    parts |= {name: str(getattr(runner.config, name, None)) for name in ("dtype", "quantization", "is_draft_model")}
    text = json.dumps(parts, sort_keys=True, default=str)
    names = ", ".join(parts.get("architectures") or [type(runner.model).__name__])
    return {
        "engine": "sglang",
        "sglang": version(),
        "checkpoint-engine-sglang": __version__,
        "torch": torch.__version__,
        "device": "cpu" if runner.device.type == "cpu" else torch.cuda.get_device_name(runner.device),
        "model": f"{names} {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "role": runner.role,
        "worker": place,
    }
