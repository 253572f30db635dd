"""A sample of SGLang's zoo: whatever the architecture, an update leaves what a start leaves, or is refused by name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.zoo.sglang import PROCESS, Place, outcome, run
from tests.zoo.sglang_families import SAMPLE

REFUSED = {"MiniCPM3ForCausalLM": "kv_b_proj"}
"""Its loader removes layers and cannot run twice."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def zoo(directory: Path, sglang_python: Path) -> dict[str, dict[str, Any]]:
    return run(Place(sglang_python), directory, SAMPLE)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family(zoo: dict[str, dict[str, Any]], name: str) -> None:
    found = zoo[name]
    assert outcome(found) == ("refused" if name in REFUSED else "equal"), found
    assert REFUSED.get(name, "") in found.get("error", "")


def test_what_is_derived_or_tied_by_a_loader_is_told(zoo: dict[str, dict[str, Any]]) -> None:
    assert "gemma_weight: computed from" in zoo["Gemma2ForCausalLM"]["reason"]
    for name in ("LagunaForCausalLM", "Lfm2ForCausalLM untied", "FalconH1ForCausalLM"):
        assert [step["way"] for step in zoo[name]["steps"]] == ["proof", "plan", "plan", "loader"]


def test_experts_that_were_moved(
    zoo: dict[str, dict[str, Any]], directory: Path, sglang_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --enable-eplb does between two updates; a plan of before would fill the old slots."""
    assert "Qwen3MoeForCausalLM" in zoo
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setenv("SGLANG_PLUGINS", "checkpoint_engine")
    command = [sglang_python, "-W", "ignore", PROCESS, "experts", directory, "Qwen3MoeForCausalLM"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ways"] == ["proof", "plan", "plan", "proof"]
    assert found["moved"] > 0
    assert found["wrong"] == []
