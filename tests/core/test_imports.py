"""What is imported when, for torch takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["checkpoint_engine", "checkpoint_engine.cli.main", "checkpoint_engine.reference.server"]
)
def test_it_is_imported_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
