"""Every patch fits the vLLM that it names and no other, can be undone, and does the same as `patch -p1`."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.patches.vllm_sources import ROOT, VERSIONS

if TYPE_CHECKING:
    from collections.abc import Callable

FP8 = "vllm/model_executor/layers/quantization/fp8.py"
RELOADABLE = "vllm/model_executor/layers/quantization/utils/reloadable.py"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "checkpoint-engine-vllm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_patch_fits_is_undone_and_equals_plain_patch(version: str, vllm: Callable[[str], Path]) -> None:
    root = vllm(version)
    before = contents(root)

    done = command("patch", root, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would be patched" in done.stdout
    assert FP8 in done.stdout
    assert contents(root) == before

    done = command("patch", root)
    assert done.returncode == 0, done.stderr
    assert f"vLLM {version}" in done.stdout
    after = contents(root)
    assert {name for name in after if after[name] != before.get(name)} == set(VERSIONS[version])
    for name in VERSIONS[version]:
        py_compile.compile(str(root / name), cfile=str(root.parent / "compiled"), doraise=True)

    assert "is patched already" in command("patch", root).stdout
    assert contents(root) == after

    done = command("patch", root, "--revert", "--json")
    assert sorted(json.loads(done.stdout)["files"]) == sorted(VERSIONS[version])
    assert contents(root) == before
    assert "is not patched" in command("patch", root, "--revert").stdout

    if shutil.which("patch"):
        patch = (ROOT / "patches" / "vllm" / f"{version}.patch").read_bytes()
        done = subprocess.run(["patch", "-p1"], input=patch, cwd=root, capture_output=True, timeout=60, check=True)
        assert b"fuzz" not in done.stdout
        assert contents(root) == after
        subprocess.run(["patch", "-p1", "-R"], input=patch, cwd=root, capture_output=True, timeout=60, check=True)
        assert contents(root) == before


def test_a_vllm_that_was_changed_is_refused_and_left_alone(vllm: Callable[[str], Path]) -> None:
    root = vllm("0.10.2")
    (root / FP8).write_text((root / FP8).read_text() + "\n# mine\n")
    before = contents(root)
    done = command("patch", root)
    assert done.returncode == 1
    assert f"{FP8} in" in done.stderr
    assert "pip install --force-reinstall --no-deps vllm==0.10.2" in done.stderr
    assert contents(root) == before


def test_a_patched_vllm_that_was_changed_is_not_reverted(vllm: Callable[[str], Path]) -> None:
    root = vllm("0.10.2")
    assert command("patch", root).returncode == 0
    (root / RELOADABLE).write_text("# mine\n")
    before = contents(root)
    done = command("patch", root, "--revert")
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert contents(root) == before


def test_what_cannot_be_written_leaves_all_as_it_was(vllm: Callable[[str], Path]) -> None:
    root = vllm("0.10.2")
    shutil.rmtree((root / RELOADABLE).parent)
    before = contents(root)
    done = command("patch", root)
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert contents(root) == before


def test_files_are_replaced_not_written_over(vllm: Callable[[str], Path], tmp_path: Path) -> None:
    """Installers link files from a cache, which the next environment is made of."""
    root = vllm("0.10.2")
    linked = tmp_path / "cache"
    linked.hardlink_to(root / FP8)
    before = linked.read_bytes()
    assert command("patch", root).returncode == 0
    assert linked.read_bytes() == before


@pytest.mark.parametrize("version", ["0.9.2", "0.10.1", "0.11.3"])
def test_an_unknown_version_is_refused_with_what_to_do(version: str, tmp_path: Path) -> None:
    fake_vllm(tmp_path, version)
    done = command("patch", tmp_path)
    assert done.returncode == 1
    assert f"no patch for vLLM {version}" in done.stderr
    assert "0.10.2, 0.11.0" in done.stderr
    assert "vLLM 0.16 or newer" in done.stderr


@pytest.mark.parametrize("version", ["0.16.0", "0.33.0+cpu", "1.0.0"])
def test_a_version_that_needs_no_patch_is_told_so(version: str, tmp_path: Path) -> None:
    fake_vllm(tmp_path, version)
    done = command("patch", tmp_path)
    assert done.returncode == 0
    assert "needs no patch" in done.stdout


def test_a_directory_without_vllm_is_refused(tmp_path: Path) -> None:
    done = command("patch", tmp_path)
    assert done.returncode == 1
    assert "holds no vllm/" in done.stderr


def test_the_patches_hold_the_module_as_it_is_now() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "patches" / "refresh.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fake_vllm(root: Path, version: str) -> None:
    (root / "vllm").mkdir()
    (root / "vllm" / "__init__.py").write_text("")
    (root / "vllm" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
