"""FP8 layers of real vLLM sources, patched, are after an update what a fresh load makes; unpatched, they fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.environments import python_of
from tests.patches.vllm_sources import extract

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
PATCHED = ["0.10.2", "0.11.2", "0.13.0", "0.15.1"]  # what the versions between them have, these have too
UNPATCHED = "0.10.2"
CASES = 19
"""In `fp8_layers.py`."""

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def python() -> Path:
    """Of the environment that scripts/make_vllm_env.sh makes: old sources run with its newer libraries."""
    return python_of("vllm")


@pytest.fixture(scope="module")
def found(index: None, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, str]]]:
    """What is wrong in each tree and case, all from one run; the tree without the patch is called `unpatched`."""
    trees: dict[str, Path] = {}
    for version in PATCHED:
        tree = tmp_path_factory.mktemp("tree")
        extract(version, tree, lambda name: name.endswith(".py"))
        if version == UNPATCHED:
            trees["unpatched"] = Path(shutil.copytree(tree, tree.with_name("unpatched")))
        command = Path(sys.executable).parent / "checkpoint-engine-vllm"
        subprocess.run([command, "patch", tree], check=True, timeout=60, capture_output=True)
        trees[version] = tree
    done = subprocess.run(
        [python, HERE / "fp8_layers.py", *trees.values()],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=tmp_path_factory.mktemp("run"),
        env={name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    yield dict(zip(trees, map(json.loads, done.stdout.splitlines()), strict=True))
    for tree in trees.values():
        shutil.rmtree(tree)


@pytest.mark.parametrize("version", PATCHED)
def test_patched_layers_are_what_a_fresh_load_makes(version: str, found: dict[str, dict[str, str]]) -> None:
    assert {case: wrong for case, wrong in found[version].items() if wrong} == {}
    assert len(found[version]) == CASES


def test_layers_without_the_patch_fail_each_of_these_cases(found: dict[str, dict[str, str]]) -> None:
    assert {case: wrong for case, wrong in found["unpatched"].items() if not wrong} == {}
    assert {case for case in found[UNPATCHED] if not case.endswith(("in part", "at once"))} == set(found["unpatched"])
