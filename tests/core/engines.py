"""What tests ask of a reference engine."""

from __future__ import annotations

from pathlib import Path

from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.reference.process import ReferenceProcess


def assert_holds(engine: ReferenceProcess, directory: Path) -> None:
    """Every worker holds exactly this checkpoint."""
    for result in ReferenceClient(engine.endpoint).collective_rpc("verify", Deadline(20), [str(directory)]):
        assert result["ok"], result
