"""Runs every script in `attacks/`."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import open_device
from checkpoint_engine.errors import CheckpointFormatError
from checkpoint_engine.link.channel import SenderChannel

ATTACKS = Path(__file__).parents[2] / "attacks"
SCRIPTS = sorted(path for path in ATTACKS.glob("*/*.py") if path.stem != "victim")


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets scripts of this folder find their victim; each folder has its own."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "victim", raising=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_attack_is_refused(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(script.parent, monkeypatch)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as failure:
        if str(failure).startswith("SKIPPED"):
            pytest.skip(str(failure))
        pytest.fail(str(failure))
    assert capsys.readouterr().out.startswith(("refused within", "turned away"))


def test_there_are_attacks_on_all_doors() -> None:
    assert {path.parent.name for path in SCRIPTS} == {"files", "http", "link", "ranks"}


def test_an_attack_that_succeeds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(ATTACKS / "files", monkeypatch)
    victim = importlib.import_module("victim")
    harmless = victim.safetensors({"x": victim.tensor(0, 4)}, bytes(4))
    with pytest.raises(SystemExit, match="NOT REFUSED: the checkpoint was registered"):
        victim.attack(harmless, expect=CheckpointFormatError)


def test_an_engine_that_is_fooled_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(ATTACKS / "link", monkeypatch)
    victim = importlib.import_module("victim")

    def honest(channel: SenderChannel) -> None:
        staging = open_device("cpu").allocate(4096)
        channel.send(victim.begin(4096), Deadline(5.0), staging.descriptors)
        staging.close()
        victim.expect_accepted(channel)
        victim.load_and_finish(channel)

    with pytest.raises(SystemExit, match="NOT REFUSED: it ended with None"):
        victim.attack_worker(honest)
