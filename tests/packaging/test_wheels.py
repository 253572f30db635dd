"""Each package builds a wheel that installs alone into an empty environment and works there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "checkpoint-engine-core": "checkpoint_engine",
    "checkpoint-engine-vllm": "checkpoint_engine_vllm",
    "checkpoint-engine-sglang": "checkpoint_engine_sglang",
}


def uv(*arguments: object, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        ["uv", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    directory = tmp_path_factory.mktemp("wheels")
    for name in PACKAGES:
        uv("build", "--quiet", "--wheel", "--package", name, "--out-dir", directory)
    return {name: next(directory.glob(f"{name.replace('-', '_')}-*.whl")) for name in PACKAGES}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_holds_its_package_types_and_licence_only(wheels: dict[str, Path], name: str) -> None:
    names = zipfile.ZipFile(wheels[name]).namelist()
    package = PACKAGES[name]
    assert f"{package}/py.typed" in names
    assert any(entry.endswith("licenses/LICENSE") for entry in names)
    assert {entry.split("/")[0] for entry in names} == {package, wheels[name].name.rsplit("-", 3)[0] + ".dist-info"}


def test_the_vllm_wheel_holds_the_patches(wheels: dict[str, Path]) -> None:
    patches = ROOT / "patches" / "vllm"
    with zipfile.ZipFile(wheels["checkpoint-engine-vllm"]) as wheel:
        for path in patches.iterdir():
            assert wheel.read(f"checkpoint_engine_vllm/patches/{path.name}") == path.read_bytes()


@pytest.mark.timeout(900)
def test_the_wheels_work_in_an_empty_environment(wheels: dict[str, Path], tmp_path: Path) -> None:
    environment = tmp_path / "env"
    uv("venv", "--quiet", environment)
    uv("pip", "install", "--quiet", "--python", environment / "bin" / "python", wheels["checkpoint-engine-core"])
    command = environment / "bin" / "checkpoint-engine"
    done = subprocess.run(
        [command, "demo", "--json", "--updates", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    plugins = (wheels["checkpoint-engine-vllm"], wheels["checkpoint-engine-sglang"])
    uv("pip", "install", "--quiet", "--python", environment / "bin" / "python", *plugins)
    code = (
        "from checkpoint_engine.client.auto import load_client; import checkpoint_engine_vllm as p;"
        "print(load_client('vllm').__name__, p.WorkerExtension.__name__, load_client('sglang').__name__)"
    )
    done = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.split() == ["VllmClient", "WorkerExtension", "SGLangClient"], done.stderr
