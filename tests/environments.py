"""The environments that scripts/make_vllm_env.sh and scripts/make_sglang_env.sh make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_of(engine: str) -> Path:
    """Python of an engine's environment, which CHECKPOINT_ENGINE_…_ENV may name; skips where there is none."""
    directory = Path(os.environ.get(f"CHECKPOINT_ENGINE_{engine.upper()}_ENV", ROOT / ".venvs" / engine))
    python = directory / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {engine} in {directory}: run scripts/make_{engine}_env.sh")
    return python
