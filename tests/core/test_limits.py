"""Whoever waits is more patient than the one that it waits for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import checkpoint_engine
from checkpoint_engine import limits

LOCAL = {"_POLL_SECONDS", "_TICK_SECONDS", "_PARENT_CHECK_SECONDS", "_SHORTEST_SECONDS", "_KEEP_ALIVE_SECONDS"}
"""How often somebody looks, or what nothing else depends on."""
ALONE = {
    "api/serving.py": "_GRACE_SECONDS",  # uvicorn's own; whoever started the server has a grace of its own
    "cli/demo.py": "_SECONDS",
    "device/registering.py": "_CLOSE_SECONDS",
    "reference/process.py": "_END_SECONDS",
    "reference/worker.py": "_STALL_SECONDS",
    "settings.py": "_DEFAULT_PATIENCE_SECONDS",
}


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [
        ("WORKER_GOODBYE", "RANK_GOODBYE"),
        ("LAST_WORD", "WORKER_GOODBYE"),
        ("FETCH_GOODBYE", "WORKER_GOODBYE"),
        ("BEAT", "EXPLANATION"),
        ("EXPLANATION", "SILENCE"),
        ("SILENCE", "RANK_GOODBYE"),
        ("RANK_GOODBYE", "HUNG"),
        ("KNOCK", "SETTLE"),
        ("ANSWER", "SETTLE"),
        ("SETTLE", "RANK_SETTLE"),
        ("HEAR", "SETTLE"),
        ("RANK_GOODBYE", "ROLLBACK_TALK"),
        ("RANK_GOODBYE", "RANK_SETTLE"),
        ("RANK_SETTLE", "PARENT_SETTLE"),
        ("PARENT_SETTLE", "PARENT_MARGIN"),
        ("ABORT", "PARENT_SETTLE"),
        ("WORKER_GOODBYE", "ORPHAN_SETTLE"),
        ("ORPHAN_SETTLE", "ORPHAN_GRACE"),
        ("BOARD_LEAVE", "PROCESS_GRACE"),
        ("PEER_KNOCK", "CONNECT"),
        ("PARENT_MARGIN", "UPDATE"),
    ],
)
def test_the_order(shorter: str, longer: str) -> None:
    assert getattr(limits, shorter) < getattr(limits, longer)


def test_a_rank_outlasts_all_that_its_client_does_after_a_failure() -> None:
    assert limits.ANSWER + 2 * limits.SETTLE < limits.RANK_SETTLE


def test_a_command_outlasts_all_that_a_rank_does_after_its_deadline() -> None:
    assert limits.EXPLANATION + limits.RANK_GOODBYE + limits.RANK_SETTLE < limits.PARENT_MARGIN


def test_no_other_limits_stand_elsewhere() -> None:
    root = Path(checkpoint_engine.__file__).parent
    found = {
        (str(path.relative_to(root)), name)
        for path in root.rglob("*.py")
        for name in re.findall(r"^(\w*_SECONDS)\b[^=\n]*=", path.read_text(), re.MULTILINE)
        if name not in LOCAL
    }
    assert found <= set(ALONE.items())
