"""Real vLLM joins: by the command while it serves, and by itself when it starts. Seeds are ranks on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cores import cores
from tests.p2p.hosts import Network, why_not
from tests.p2p.seeding import ENVIRONMENT as HOSTS_ENVIRONMENT
from tests.p2p.seeding import seeds
from tests.ports import free_port
from tests.vllm.conftest import vllm_environment

COMMAND = str(Path(sys.executable).parent / "checkpoint-engine")
TOKEN = "a-token-of-sixteen-or-more"
ENVIRONMENT = {
    "PS_MAX_BUCKET_SIZE_GB": "0.0001",
    "CHECKPOINT_ENGINE_P2P_HOST": "127.0.0.1",
    "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
    "CHECKPOINT_ENGINE_TOKEN": TOKEN,
}


@pytest.fixture(scope="module")
def seed(checkpoints: Path) -> Iterator[str]:
    """Address of a parameter server that holds `qwen3` and shares its memory."""
    port = free_port()
    process = subprocess.Popen(
        [COMMAND, "serve", "--device", "cpu", "--allow-root", str(checkpoints), "--port", str(port), "--share"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
            files = [str(file) for file in sorted((checkpoints / "qwen3").glob("*.safetensors"))]
            client.post("/v1/checkpoints/qwen3/files", json={"files": files}).raise_for_status()
            client.post("/v1/checkpoints/qwen3/gather-metas").raise_for_status()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


class Asking(threading.Thread):
    """Asks an engine for the same tokens again and again, and notes how long each answer takes."""

    def __init__(self, server: Any) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self.answers: list[list[list[int]]] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self._over.wait(0.2):  # the two engines share the processor
            started = time.monotonic()
            self.answers.append(self._server.tokens(4))
            self.seconds.append(time.monotonic() - started)

    def end(self) -> None:
        self._over.set()
        self.join(60)


@contextlib.contextmanager
def kept_off(core: int) -> Iterator[None]:
    """Whatever is started meanwhile stays off a core on which a worker of vLLM spins.

    Linux 6.18 hardly charges one who only yields to other groups of processes (autogroups); a newcomer may then wait
    for minutes there, although the other core is idle.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before - {core} or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_serving_engine_joins_from_two_hosts_of_two_ranks_while_theirs_answers(
    serve: Callable[..., Any],
    cold: Callable[..., dict[str, Any]],
    checkpoints: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The joiner's rank is on a third host; nothing but its own link reaches the engine from there."""
    expected = cold("qwen3")["tokens"]
    # vLLM's workers spin while they wait: on one core with the joiner's they would take all of it.
    theirs = serve("qwen3", socket_path=tmp_path / "theirs.sock", VLLM_CPU_OMP_THREADS_BIND="1")
    with kept_off(1):
        server = serve("qwen3", "--load-format", "dummy", socket_path=tmp_path / "vllm.sock")
    assert server.tokens() != expected
    command = [COMMAND, "join", "--metas", str(tmp_path / "metas.json"), "--engine", "vllm", "--json"]
    with kept_off(1), Network(3) as network, seeds(network, checkpoints / "qwen3", tmp_path / "metas.json"):
        before = [asked(theirs) for _ in range(6)][1:]
        asking = Asking(theirs)
        asking.start()
        done = subprocess.run(
            network.command(2, [*command, "--endpoint", server.endpoint, "--device", "cpu"]),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | HOSTS_ENVIRONMENT | {"PS_MAX_BUCKET_SIZE_GB": "0.0001"},
        )
        asking.end()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "p2p"
    assert server.tokens() == expected
    assert len(asking.answers) >= 3
    assert all(answer == [tokens[:4] for tokens in expected] for answer in asking.answers)
    medians = statistics.median(before), statistics.median(asking.seconds)
    record_property("seconds", medians)
    print("their answers took {:.3f} s before and {:.3f} s during".format(*medians))
    theirs.close()
    server.close()


def asked(server: Any) -> float:
    started = time.monotonic()
    server.tokens(4)
    return time.monotonic() - started


def test_an_engine_starts_from_running_ones(
    seed: str, serve: Callable[..., Any], cold: Callable[..., dict[str, Any]], checkpoints: Path, tmp_path: Path
) -> None:
    """It has a configuration and a tokenizer, and no weights of its own."""
    model = tmp_path / "no-weights"
    shutil.copytree(checkpoints / "qwen3", model, ignore=shutil.ignore_patterns("*.safetensors*"))
    extra = json.dumps({"metas": seed})
    server = serve(model, "--load-format", "checkpoint_engine", "--model-loader-extra-config", extra, **ENVIRONMENT)
    assert server.tokens() == cold("qwen3")["tokens"]
    server.close()


def test_two_workers_start_from_running_ones_and_read_the_checkpoint_once(
    seed: str, serve: Callable[..., Any], update: Callable[..., Any], checkpoints: Path, tmp_path: Path
) -> None:
    model = tmp_path / "no-weights"
    shutil.copytree(checkpoints / "qwen3", model, ignore=shutil.ignore_patterns("*.safetensors*"))
    options = ("--tensor-parallel-size", "2", "--load-format", "checkpoint_engine")
    environment = ENVIRONMENT | {"CHECKPOINT_ENGINE_METAS": seed, "VLLM_LOGGING_LEVEL": "INFO"}
    server = serve(model, *options, VLLM_CPU_OMP_THREADS_BIND=cores(2), **environment)
    started_with = server.tokens()
    # Two workers round otherwise than one; what an update brings is what a cold start has (test_serve_tp2.py).
    done = update(checkpoints / "qwen3", server, "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    assert server.tokens() == started_with
    server.close()
    said = re.findall(r"took (\S+) GB of 'qwen3' .* this worker read (\S+) GB", server.log.read_text())
    shares = [float(share) for _, share in said]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(float(said[0][0]), rel=0.05)  # gaps of alignment are read along
    assert min(shares) > 0.3 * max(shares)


def test_an_engine_that_finds_no_seed_says_so_at_once(vllm_bin: Path, checkpoints: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [vllm_bin / "vllm", "serve", checkpoints / "qwen3", "--load-format", "checkpoint_engine"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=vllm_environment(CHECKPOINT_ENGINE_METAS=nowhere),
    )
    assert done.returncode != 0
    assert f"{nowhere} cannot be reached" in done.stderr
