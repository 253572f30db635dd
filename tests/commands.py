"""`checkpoint-engine` as a person runs it: a process of its own, in this environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "checkpoint_engine", *map(str, arguments)]


def run_command(
    *arguments: object, timeout: float = 100, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run(command_line(*arguments), timeout, environment)


def run(
    command: list[str], timeout: float = 100, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """With lines long enough that no word is broken, and more in its environment."""
    env = {**os.environ, "COLUMNS": "200", **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)
