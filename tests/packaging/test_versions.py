"""Three wheels have one version, and plugins take every core of its minor version."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
SAID = re.compile(r'^version = "([^"]*)"$', re.MULTILINE)
PINNED = re.compile(r'"checkpoint-engine-core(?:\[[^\]]*\])?~=([^"]*)"')


def said(root: Path) -> tuple[set[str], list[str]]:
    texts = [path.read_text() for path in (root / "pyproject.toml", *(root / "packages").glob("*/pyproject.toml"))]
    assert len(texts) == 4
    return {SAID.findall(text)[0] for text in texts}, [pin for text in texts for pin in PINNED.findall(text)]


def test_all_say_the_same_version() -> None:
    (version,), pins = said(ROOT)
    assert pins == [".".join([*version.split(".")[:2], "0"])] * 2


@pytest.mark.thorough
def test_another_version_is_written_everywhere(tmp_path: Path) -> None:
    for path in (ROOT / "pyproject.toml", *(ROOT / "packages").glob("*/pyproject.toml")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    script = tmp_path / "scripts" / "set_version.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "set_version.py", script)
    subprocess.run([sys.executable, str(script), "1.4.2"], check=True)
    assert said(tmp_path) == ({"1.4.2"}, ["1.4.0"] * 2)
    assert subprocess.run([sys.executable, str(script), "next"], check=False, stderr=subprocess.PIPE).returncode
