"""Frameworks as they are, on the CPU: verl's own manager, TRL's own trainer, Ray, and FSDP2 into vLLM and SGLang."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command
from tests.environments import ROOT, python_of
from tests.sglang.conftest import plugins as sglang_plugins  # noqa: F401 - a fixture
from tests.sglang.conftest import serving as serving_sglang
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


def run(python: Path, script: Path | str, *arguments: object, **environment: str) -> str:
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


@pytest.mark.parametrize("workers", [1])
def test_fsdp2_publishes_every_step_into_vllm_and_sglang_at_once(
    frameworks: Path,
    checkpoints: Path,
    sglang_plugins: Path,  # noqa: F811
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    workers: int,
) -> None:
    size = ("--tensor-parallel-size", str(workers))
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:workers])}

    def vllm(model: Path, *options: str) -> VllmServer:
        return VllmServer(python_of("vllm").parent, model, tmp_path / "vllm.log", *size, *options, **cores)

    begun = serving_sglang(python_of("sglang"), checkpoints, sglang_plugins, tmp_path_factory)
    start = next(begun)
    sglang = start("qwen3", *size, workers=workers)
    served = vllm(checkpoints / "qwen3", "--load-format", "dummy")
    try:
        served.wait()
        engines = (served.endpoint, sglang.endpoint)
        launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        example = ROOT / "examples" / "fsdp2_two_engines.py"
        saved = tmp_path / "trained"
        shutil.copytree(checkpoints / "qwen3", saved, ignore=shutil.ignore_patterns("*.safetensors*"))
        weights = ("--save", saved / "model.safetensors")
        said = run(frameworks, "-m", *launch, example, checkpoints / "qwen3", *engines, *size, *weights)
        steps = re.findall(r"step \d+: loss ([\d.]+), \['(.*)', '(.*)'\]", said)
        assert len(steps) == 6, said
        losses = [float(loss) for loss, _, _ in steps]
        assert losses[-1] < losses[0] / 10
        assert len(set(steps)) > 2
        assert steps[-1][1:] == (" Paris, as everybody knows.",) * 2
        assert [worker["version"] for worker in served.rpc("checkpoint_engine_status")] == ["step-5"] * workers
        assert {worker["version"] for worker in sglang.status()["workers"]} == {"step-5"}
        where = ("--endpoint", served.endpoint, "--engine", "vllm", "--device", "cpu")
        equal = run_command("verify", saved, *where, *size, timeout=240)
        assert equal.returncode == 0, equal.stderr
        after = served.tokens(), sglang.state()
        for server in (served, sglang):
            server.close()
        sglang, served = start(saved, *size, workers=workers), vllm(saved)
        served.wait()
        assert (served.tokens(), sglang.state()) == after
    finally:
        served.close()
        next(begun, None)
