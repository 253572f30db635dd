"""The example of a loop that outlives a replica: it dies, the others go on, and a new one joins them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint_engine.reference.process import ReferenceProcess
from tests.core.p2p_help import needs_mooncake
from tests.core.p2p_processes import ENVIRONMENT
from tests.ports import free_port

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(300), needs_mooncake]

EXAMPLE = Path(__file__).parents[2] / "examples" / "elastic_loop.py"
SPEC = '{"extras": false, "dtype": "float32"}'


class Loop:
    """Two ranks of the example, and what they say."""

    def __init__(self, directory: Path, endpoints: list[str]) -> None:
        self.log = directory / "log"
        self.metas = directory / "metas.json"
        environment = {**os.environ, **ENVIRONMENT, "CHECKPOINT_ENGINE_P2P": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, str(EXAMPLE), *endpoints, "--metas", str(self.metas), "--check", str(directory)]
        command += ["--seconds", "20"]  # in real loops a step takes longer than a join
        with self.log.open("w") as output:
            self.ranks = [
                subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=output, stderr=output)
                for rank in range(2)
            ]

    def wait_for(self, pattern: str, after: int = -1, seconds: float = 60) -> int:
        """Until the loop says this of a later step than that; gives the step."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for step, words in re.findall(r"^step-(\d+): (.*)$", self.log.read_text(), re.MULTILINE):
                if int(step) > after and re.search(pattern, words):
                    return int(step)
            assert all(rank.poll() is None for rank in self.ranks), self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(f"{pattern} was not said after step {after}:\n{self.log.read_text()}")

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def test_a_replica_dies_and_a_new_one_joins_while_the_loop_goes_on(tmp_path: Path) -> None:
    port = free_port()
    with ReferenceProcess(SPEC, 1) as survivor:
        mortal = start_at(port)
        loop = Loop(tmp_path, [survivor.endpoint, f"http://127.0.0.1:{port}"])
        try:
            step = loop.wait_for("replica 1 as a cold start")
            kill(mortal)
            gone = loop.wait_for("replica 1 is gone", step)
            loop.wait_for("replica 0 as a cold start", gone)
            mortal = start_at(port)
            joined = subprocess.run(
                [
                    *(sys.executable, "-m", "checkpoint_engine", "join", "--metas", str(loop.metas)),
                    *("--engine", "reference", "--endpoint", f"http://127.0.0.1:{port}", "--device", "cpu"),
                ],
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert joined.returncode == 0, joined.stderr
            back = loop.wait_for("replica 1 as a cold start", gone)
            loop.wait_for("replica 0 as a cold start", back)
        finally:
            loop.close()
            kill(mortal)
    assert "WRONG" not in loop.log.read_text()


def start_at(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "checkpoint_engine.reference.server", "--spec", SPEC, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    """It ends at once, and its worker with it."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
