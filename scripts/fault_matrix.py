"""Runs the matrix of faults, or a part of it, and writes what came of every cell as JSON lines; see docs/faults.md.

uv run python scripts/fault_matrix.py RESULTS.jsonl [--seconds 3600] [--like 'worker .*load']
uv run python scripts/fault_matrix.py RESULTS.jsonl --table    # what was found, for docs/faults.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.core.fault_matrix import ROLES, SIGNALS, Matrix, cells


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further cell after so long")
    parser.add_argument("--like", default="", help="only cells that this pattern finds")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and run nothing")
    options = parser.parse_args()
    if options.table:
        sys.stdout.write(_table(_lines(options.results)))
        return
    # In the background it is ignored, also by children that a cell interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = {line["cell"] for line in _lines(options.results)}
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="m-") as directory, pytest.MonkeyPatch.context() as patched:
        matrix = Matrix(Path(directory), patched)
        try:
            for cell in cells():
                if str(cell) in done or not re.search(options.like, str(cell)) or time.monotonic() > until:
                    continue
                outcome = matrix.run(cell)
                line = {
                    "cell": str(cell),
                    "bounded": outcome.bounded,
                    "healed": outcome.healed,
                    "seconds": round(outcome.seconds, 1),
                    "exit_code": outcome.exit_code,
                    "problems": outcome.problems,
                    "said": outcome.said[-1500:],
                }
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                sys.stdout.write(f"{cell}: {outcome.seconds:.1f} s {outcome.problems or 'good'}\n")
                sys.stdout.flush()
        finally:
            matrix.close()


def _table(lines: list[dict[str, Any]]) -> str:
    """Counts for each role and signal."""
    rows = ["| who, how | cells | tried | bounded | healed | all good | longest |", "|---|---|---|---|---|---|---|"]
    for role, how in itertools.product(ROLES, SIGNALS):
        those = [line for line in lines if line["cell"].startswith(f"{role}, ") and f", {how}, " in line["cell"]]
        there = sum(cell.role == role and cell.signal == how for cell in cells())
        counts = [sum(line[key] for line in those) for key in ("bounded", "healed")]
        good = sum(not line["problems"] for line in those)
        longest = max((line["seconds"] for line in those), default=0)
        rows.append(
            f"| {role}, {how} | {there} | {len(those)} | {counts[0]} | {counts[1]} | {good} | {longest:.0f} s |"
        )
    total = [sum(line[key] for line in lines) for key in ("bounded", "healed")]
    good = sum(not line["problems"] for line in lines)
    rows.append(f"| **all** | {len(cells())} | {len(lines)} | {total[0]} | {total[1]} | {good} | |")
    return "\n".join(rows) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
