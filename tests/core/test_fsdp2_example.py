"""The example of a training loop: FSDP2 on two ranks, every step into a serving engine, equal to a cold start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_engine.reference.process import ReferenceProcess
from tests.ports import free_port

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"
SPEC = '{"extras": false, "dtype": "float32"}'


@pytest.mark.parametrize(("method", "workers"), [("direct", 2), ("broadcast", 2)])
def test_every_step_of_an_fsdp2_loop_is_served_as_after_a_cold_start(method: str, workers: int, tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with ReferenceProcess(SPEC, workers) as engine:
        command = [sys.executable, str(EXAMPLE), engine.endpoint, "--check", str(tmp_path), "--method", method]
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    steps = re.findall(r"step (\d): loss ([\d.]+), as a cold start", said[0])
    assert [number for number, _ in steps] == ["0", "1", "2", "3"]
    losses = [float(loss) for _, loss in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
