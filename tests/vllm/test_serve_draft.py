"""A draft model with a checkpoint of its own, brought along by the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.endurance

Update = Callable[..., "subprocess.CompletedProcess[str]"]


def counted(server: Any, what: str) -> float:
    name = f"vllm:spec_decode_num_{what}_tokens_total"
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def accepted(server: Any) -> float:
    """What part of the draft's guesses was right, of those made for these tokens."""
    before = [counted(server, what) for what in ("accepted", "draft")]
    server.tokens()
    right, guessed = (counted(server, what) - old for what, old in zip(("accepted", "draft"), before, strict=True))
    return right / guessed


def test_a_draft_of_its_own_is_brought_and_compared_too(
    serve: Callable[..., Any], update: Update, verify: Update, checkpoints: Path, tmp_path: Path
) -> None:
    """A draft with the served model's weights guesses every token; one that is left behind guesses none."""
    served, other = checkpoints / "qwen3", checkpoints / "qwen3-b"
    same = shutil.copytree(served, tmp_path / "draft")
    speculative = {"method": "draft_model", "model": str(other), "num_speculative_tokens": 3}
    server = serve("qwen3", "--speculative-config", json.dumps(speculative))
    assert accepted(server) < 0.5
    assert verify(served, server, "--draft", str(other)).returncode == 0
    for draft, share in ((same, 1.0), (other, None)):
        done = update(served, server, "--draft", str(draft))
        assert done.returncode == 0, done.stderr
        found = accepted(server)
        assert found == share if share else found < 0.5
    differs = verify(served, server, "--draft", str(same))
    assert (differs.returncode, "draft_model." in differs.stdout) == (1, True), differs.stdout + differs.stderr
    itself = update(served, server, "--draft", str(served))
    assert (itself.returncode, "without being named" in itself.stderr) == (1, True), itself.stderr
    server.close()
