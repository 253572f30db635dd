"""A third engine, as somebody else would write it, works without a change in the core: examples/transformers_engine.

It runs in vLLM's environment, which has transformers; the parameter server in this one, which has not.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.commands import run_command
from tests.environments import ROOT
from tests.vllm.conftest import vllm_environment

HERE = Path(__file__).parent
EXAMPLE = ROOT / "examples" / "transformers_engine"
PROMPT = [1, 5, 9, 2]
Run = Callable[..., dict[str, Any]]


def test_it_is_small_and_imports_the_sdk_alone() -> None:
    files = list((EXAMPLE / "transformers_engine").glob("*.py"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len(lines) < 300
    imported = {line.split()[1] for line in lines if line.startswith(("from checkpoint_engine", "import checkpoint"))}
    assert imported <= {"checkpoint_engine.sdk", "checkpoint_engine.sdk.client", "checkpoint_engine.sdk.plans"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as its pyproject.toml installs it, for both environments."""
    target = tmp_path_factory.mktemp("installed")
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", target, EXAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target


def importing(installed: Path) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{installed}{os.pathsep}{before}" if before else str(installed)}


@pytest.fixture(scope="module")
def models(vllm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """Directory of a model -> what a cold start of it holds and says, in a process without our code."""
    python, maker, parent = vllm_bin / "python", HERE / "transformers_models.py", tmp_path_factory.mktemp("models")
    found: dict[Path, dict[str, Any]] = {}
    for seed in (0, 1):
        directory = parent / f"seed{seed}"
        subprocess.run([python, maker, "make", directory, str(seed)], check=True, timeout=120, env=vllm_environment())
        looked = [python, maker, "look", directory]
        said = subprocess.run(looked, check=True, timeout=120, env=vllm_environment(), capture_output=True, text=True)
        found[directory] = json.loads(said.stdout.splitlines()[-1])
    one, other = found.values()
    assert one["tokens"] != other["tokens"]
    return found


@pytest.fixture(scope="module")
def endpoint(vllm_bin: Path, installed: Path, models: dict[Path, Any]) -> Iterator[str]:
    command = [vllm_bin / "python", "-m", "transformers_engine.server", next(iter(models)), "--dummy"]
    environment = vllm_environment(**importing(installed))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


@pytest.fixture(scope="module")
def run(installed: Path, endpoint: str) -> Run:
    """A command on the engine, which it finds out itself."""

    def command(name: str, directory: Path, *options: str) -> dict[str, Any]:
        where = (
            "--engine",
            "auto",
            "--endpoint",
            endpoint,
            "--device",
            "cpu",
            "--timeout",
            "60",
            "--wait",
            "60",
            "--json",
        )
        done = run_command(name, directory, *where, *options, environment=importing(installed))
        assert done.stdout, done.stderr
        return json.loads(done.stdout) | {"code": done.returncode, "said": done.stderr}

    return command


def holds(endpoint: str, expected: dict[str, Any]) -> bool:
    digest = httpx.get(f"{endpoint}/digest").json()["digest"]
    body = {"tokens": PROMPT, "count": 16}
    tokens = httpx.post(f"{endpoint}/generate", json=body, timeout=60).json()["tokens"]
    assert (digest == expected["digest"]) == (tokens == expected["tokens"])
    return digest == expected["digest"]


def test_updates_by_broadcast_and_direct_each_with_other_weights(
    run: Run, endpoint: str, models: dict[Path, dict[str, Any]]
) -> None:
    (first, cold), (second, other) = models.items()
    assert not holds(endpoint, cold)
    turns = [(method, turn % 2) for method in ("broadcast", "direct") for turn in range(4)]
    for method, turn in turns:
        directory, expected = ((first, cold), (second, other))[turn]
        done = run("update", directory, "--method", method)
        assert done["code"] == 0, done
        assert holds(endpoint, expected), (method, directory)


def test_it_is_compared_with_a_checkpoint(run: Run, endpoint: str, models: dict[Path, Any]) -> None:
    first, second = models
    assert run("update", second, "--method", "broadcast")["code"] == 0
    assert run("verify", second)["code"] == 0
    assert run("verify", first)["code"] != 0
    assert holds(endpoint, models[second])


def test_the_contract(vllm_bin: Path, installed: Path, models: dict[Path, Any]) -> None:
    command = [vllm_bin / "python", HERE / "transformers_contract.py", *models]
    environment = vllm_environment(**importing(installed))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
