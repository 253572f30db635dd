"""Random kills and stops for minutes: whatever serves is whole, and one push then brings every engine to one version.

`CHAOS_SECONDS` says for how long, `CHAOS_SEED` which choices are made.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.core.chaos import Chaos

SECONDS = float(os.environ.get("CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("CHAOS_SEED", str(time.time_ns() % 100_000)))


@pytest.mark.endurance
@pytest.mark.timeout(SECONDS + 600)
def test_every_engine_ends_on_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chaos = Chaos(tmp_path, monkeypatch, SEED)
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            chaos.one_round()
        chaos.settle()
        assert chaos.left_behind() == []
    finally:
        print(f"CHAOS_SEED={SEED}: {chaos.rounds} rounds in {SECONDS:g} s, {chaos.failed} of them failed")
        chaos.close()
