"""What strangers' names do to a terminal, and what a terminal that knows few characters does to us: nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import command_line

pytestmark = pytest.mark.pure

HOSTILE = "evil\x1b[31m\x9b2J\u202e"
RunMain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({HOSTILE: torch.ones(4), "fine": torch.ones(2)}, tmp_path / "model.safetensors")
    return tmp_path


def test_names_of_tensors_give_the_terminal_no_orders(checkpoint: Path, run_main: RunMain) -> None:
    code, said, _ = run_main("inspect", checkpoint)
    assert code == 0
    assert r"evil\x1b[31m\x9b2J\u202e" in said.replace("\n", "")
    assert not set("\x1b\x07\x9b\u202e") & set(said)


def test_nor_do_names_in_errors(tmp_path: Path, run_main: RunMain) -> None:
    (tmp_path / "a\x1b[2Jb").mkdir()
    code, _, said = run_main("inspect", tmp_path / "a\x1b[2Jb")
    assert code == 1
    assert "CheckpointFormatError" in said
    assert "\x1b" not in said


@pytest.mark.thorough
def test_a_terminal_of_few_characters_shows_what_it_can(checkpoint: Path) -> None:
    marked = checkpoint / "step-✓"
    marked.mkdir()
    (checkpoint / "model.safetensors").rename(marked / "model.safetensors")
    done = subprocess.run(
        command_line("inspect", marked),
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"step-\u2713" in done.stdout


def test_a_directory_whose_name_is_not_text_is_shown_or_refused(checkpoint: Path, run_main: RunMain) -> None:
    strange = checkpoint / os.fsdecode(b"\xff\xfe")
    strange.mkdir()
    (checkpoint / "model.safetensors").rename(strange / "model.safetensors")
    code, said, _ = run_main("inspect", strange, "--json")
    assert (code, r'"name": "\udcff\udcfe"' in said) == (0, True)
    code, _, said = run_main("update", strange, "--engine", "reference", "--endpoint", "http://localhost:1")
    assert code == 1
    assert said.startswith("SettingError")
    assert "is not UTF-8" in said


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "much"])
def test_settings_are_numbers(checkpoint: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", value)
    code, _, said = run_main("inspect", checkpoint)
    assert code == 1
    assert said.startswith("SettingError: PS_MAX_BUCKET_SIZE_GB is")
