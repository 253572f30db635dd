"""Frameworks as they are, on the CPU: verl's own manager, TRL's own trainer, Ray, and a loop into vLLM and SGLang."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.environments import ROOT, python_of
from tests.vllm.conftest import Server as VllmServer
from tests.vllm.conftest import vllm_environment

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(900)]

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def frameworks() -> Path:
    return python_of("frameworks")


@pytest.fixture(scope="session")
def checkpoints(frameworks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    maker = ROOT / "tests" / "vllm" / "models.py"
    subprocess.run([frameworks, maker, directory, "qwen3", "qwen3-b"], check=True, timeout=120)
    return directory


@pytest.fixture
def vllm(frameworks: Path, checkpoints: Path, tmp_path: Path) -> Iterator[VllmServer]:
    options = ("--load-format", "dummy", "--served-model-name", "tiny", "policy")
    server = VllmServer(python_of("vllm").parent, checkpoints / "qwen3", tmp_path / "vllm.log", *options)
    server.wait()
    yield server
    server.close()


def run(python: Path, script: Path, *arguments: object, **environment: str) -> str:
    """What a script says; it runs where no GPU is seen."""
    done = subprocess.run(
        list(map(str, [python, "-W", "ignore", script, *arguments])),
        env={
            **vllm_environment(CUDA_VISIBLE_DEVICES="", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_verl_updates_two_replicas_of_vllm_by_plan_and_tells_what_to_use(frameworks: Path, checkpoints: Path) -> None:
    turns = [checkpoints / name for name in ("qwen3", "qwen3-b", "qwen3", "qwen3-b", "qwen3")]
    said = run(frameworks, HERE / "verl_loop.py", *turns)
    found: dict[str, Any] = json.loads(next(s for s in said.splitlines() if s.startswith("RESULT "))[7:])
    assert found["equal"] == [[True, True]] * len(turns)
    assert found["differ"]
    for replica in found["told"]:
        assert replica == {"steps": [0, 1, 2, 3, 4], "cleared": 5, "version": "step-4", "way": "plan"}
    assert "in verl, use the backend checkpoint_engine instead" in found["kimi"]


def test_trl_trains_with_rollouts_of_an_engine_that_follows_it(
    frameworks: Path, checkpoints: Path, vllm: VllmServer
) -> None:
    said = run(frameworks, ROOT / "examples" / "trl_grpo.py", checkpoints / "qwen3", vllm.endpoint)
    before, after = re.findall(r"^(?:before|after): (.*)$", said, re.MULTILINE)
    assert before != after
    assert vllm.get("/weight_info") == {"weight_version": "step-6"}


def test_engine_and_trainer_are_ray_actors(frameworks: Path, checkpoints: Path) -> None:
    said = run(frameworks, ROOT / "examples" / "ray_actors.py", checkpoints / "qwen3")
    answers = re.findall(r"^(?:start|step \d): ('.*'|\".*\")(?:, equal=True.*)?$", said, re.MULTILINE)
    assert len(answers) == 4, said
    assert len(set(answers)) > 1, said  # weights of noise need not say something new after every step
