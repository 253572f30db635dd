"""Child processes."""

from __future__ import annotations

import queue
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_engine.processes import _RUN_MODULE, Child, end_all


def test_a_child_imports_nothing_from_where_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`this` stands for any module that a rank imports."""
    (tmp_path / "this.py").write_text("print('anybody wrote this')")
    monkeypatch.chdir(tmp_path)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    child = Child("x", ["this"], on_line=lambda _, line: lines.put(line), on_end=lambda _: lines.put(b""))
    assert b"Zen" in lines.get(timeout=60)
    end_all([child])
    older = subprocess.run(  # as Python 3.10 does it, which has no option for this
        [sys.executable, "-c", _RUN_MODULE, "this"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "Zen" in older.stdout
