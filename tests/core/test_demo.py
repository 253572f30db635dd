"""`checkpoint-engine demo` as people run it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from checkpoint_engine.cli.timeline_data import load_timeline
from tests.commands import run_command
from tests.core.p2p_help import needs_mooncake

pytestmark = pytest.mark.long


def test_demo_updates_twice_and_verifies_everything(tmp_path: Path) -> None:
    start = time.monotonic()
    finished = run_command("demo", "--json", "--trace", str(tmp_path / "trace.json"))
    assert finished.returncode == 0, finished.stderr
    assert time.monotonic() - start < 60  # 30 s where nothing else runs
    report = json.loads(finished.stdout)
    assert report["ok"] is True
    assert report["method"] == "broadcast"
    assert [update["version"] for update in report["updates"]] == ["step-1", "step-2"]
    assert report["bytes"] == sum(update["bytes"] for update in report["updates"]) > 50e6
    assert report["verified_tensors"] == 2 * 2 * 46  # updates, workers, parameters of a worker
    assert report["seconds"] > 0
    traced = load_timeline(tmp_path / "trace.json")
    assert traced.about["version"] == "step-2"
    assert (
        traced.about["bytes"]
        == report["updates"][1]["bytes"]
        <= sum(lane.nbytes for lane in traced.lanes if lane.stage == "copy")
    )
    assert {(lane.rank, lane.stage) for lane in traced.lanes} >= {(r, s) for r in (0, 1) for s in ("copy", "load")}


def test_demo_feeds_two_engines_and_prints_a_table() -> None:
    finished = run_command("demo", "--ranks", "2", "--tensor-parallel-size", "1", "--updates", "1")
    assert finished.returncode == 0, finished.stderr
    assert "2 ranks updated 2 engines of 1 worker in place" in finished.stdout
    assert "92 parameters equal" in finished.stdout
    assert "load into parameters" in finished.stdout


@pytest.mark.parametrize("arguments", [("--ranks", "3"), ("--ranks", "1", "-tp", "2")])
def test_demo_refuses_ranks_that_do_not_match(arguments: tuple[str, ...]) -> None:
    finished = run_command("demo", *arguments)
    assert finished.returncode == 1
    assert "SettingError" in finished.stderr
    assert "multiple" in finished.stderr
    assert "Traceback" not in finished.stderr


@needs_mooncake
def test_demo_lets_an_engine_of_another_size_join() -> None:
    finished = run_command("demo", "--json", "--method", "p2p", "--updates", "1")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    steps = [(update["version"], update["method"]) for update in report["updates"]]
    assert steps == [("step-1", "broadcast"), ("step-1", "p2p")]
    assert [update["verified_tensors"] for update in report["updates"]] == [92, 46]
    assert report["updates"][1]["stages"]["fetch"] > 0
