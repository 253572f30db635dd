"""verl's checkpoint-engine backend `checkpoint_engine`. Importing this registers it, which verl does by itself.

It stands in verl's registry of backends and, since vLLM's workers take weights their own way, in that of rollouts.
"""

from __future__ import annotations

import importlib
from typing import Any

from checkpoint_engine.verl.backend import VerlBackend

__all__ = ["BACKEND", "register"]

BACKEND = "checkpoint_engine"
"""What verl's configuration calls it."""


def register() -> None:
    """Makes it known to verl; once more does no harm."""
    base: Any = importlib.import_module("verl.checkpoint_engine.base")
    base.CheckpointEngineRegistry.register(BACKEND)(VerlBackend)
    rollouts: Any = importlib.import_module("verl.workers.rollout.base")
    rollouts._ROLLOUT_REGISTRY["vllm", "async"] = "checkpoint_engine.verl.rollout.VllmRollout"  # noqa: SLF001 - no other


register()
