"""Random kills and stops for minutes: whatever serves is whole, and one push then brings every engine to one version.

`CHAOS_SECONDS` says for how long, `CHAOS_SEED` which choices are made.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.chaos import SECONDS, reference_fleet, run_chaos


@pytest.mark.endurance
@pytest.mark.timeout(SECONDS + 600)
def test_every_engine_ends_on_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_chaos(reference_fleet(tmp_path), tmp_path, monkeypatch)
