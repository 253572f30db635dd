"""Each package builds a wheel that installs alone into an empty environment and works there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts import check_release

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
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


def interpreter(version: str) -> Path | None:
    """A Python of this minor version on this machine, as uv finds it or pyenv keeps it."""
    command = ["uv", "python", "find", "--no-python-downloads", "--no-project", version]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [Path(found.stdout.strip())] if found.returncode == 0 else sorted(kept.glob(f"{version}.*/bin/python"))
    return next(iter(candidates), None)


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


def test_only_the_publisher_has_anything_to_add(wheels: dict[str, Path]) -> None:
    metadata = [check_release.metadata_of(wheel) for wheel in wheels.values()]
    assert [what for each in metadata for what in check_release.of_project(each)] == []
    assert all("CHANGELOG.md" in what for what in check_release.of_set(metadata, changelog=""))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "version", ["oldest", *(pytest.param(each, marks=pytest.mark.endurance) for each in VERSIONS[1:])]
)
def test_the_wheels_work_in_an_empty_environment(wheels: dict[str, Path], tmp_path: Path, version: str) -> None:
    found = [interpreter(each) for each in VERSIONS] if version == "oldest" else [interpreter(version)]
    python = next((each for each in found if each is not None), None)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    environment = tmp_path / "env"
    uv("venv", "--quiet", "--python", python, environment)
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
