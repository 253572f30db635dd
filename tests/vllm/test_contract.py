"""vLLM's sink keeps the contract that every sink keeps, in a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
def test_the_contract(engine: Callable[..., dict[str, Any]], checkpoints: Path, kind: str) -> None:
    both = [checkpoints / kind, checkpoints / f"{kind}-b"]
    assert engine("contract", checkpoints=both, spoilt="model.norm.weight") == {}
