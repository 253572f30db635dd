"""Real SGLang for tests, from the environment that scripts/make_sglang_env.sh makes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run, run_command
from tests.cores import cores
from tests.environments import ROOT, python_of
from tests.ports import free_port
from tests.sglang.sglang_server import Server

HERE = Path(__file__).parent
CHECKPOINTS = ("qwen3", "qwen3-b", "moe", "moe-b")
PLUGINS = ("faults", "cpu_identity", "second_model", "plain_kernels", "unpinned")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "unit" not in item.path.name:
            item.add_marker(pytest.mark.sglang)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    return python_of("sglang")


@pytest.fixture(scope="session")
def in_sglang(sglang_python: Path) -> Callable[..., Any]:
    """Runs a script of this directory in SGLang's environment; gives the JSON of its last line."""

    def run_script(script: str, *arguments: object) -> Any:
        command = list(map(str, [sglang_python, "-W", "ignore", HERE / script, *arguments]))
        environment = {
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_PLUGINS": "checkpoint_engine",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        done = run(command, timeout=400, environment=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_script


@pytest.fixture(scope="session")
def checkpoints(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny checkpoints: `qwen3`, `qwen3-b` (another seed) and so on."""
    directory = tmp_path_factory.mktemp("checkpoints")
    maker = ROOT / "tests" / "vllm" / "models.py"
    subprocess.run([sglang_python, maker, directory, *CHECKPOINTS], check=True, timeout=120)
    return directory


@pytest.fixture(scope="session")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that announces the plugins of sglang_test_plugins.py, as an installed distribution does."""
    directory = tmp_path_factory.mktemp("plugins")
    info = directory / "sglang_test_plugins-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-test-plugins\nVersion: 1\n")
    lines = [f"{name} = sglang_test_plugins:{name}" for name in PLUGINS]
    (info / "entry_points.txt").write_text("\n".join(["[sglang.srt.plugins]", *lines, ""]))
    return directory


@pytest.fixture
def serve(
    sglang_python: Path, checkpoints: Path, plugins: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Starts SGLang with one of the tiny checkpoints; it ends with the test."""
    yield from serving(sglang_python, checkpoints, plugins, tmp_path_factory)


@pytest.fixture(scope="module")
def serve_all(
    sglang_python: Path, checkpoints: Path, plugins: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """The same for all tests of a module."""
    yield from serving(sglang_python, checkpoints, plugins, tmp_path_factory)


def serving(
    sglang_python: Path, checkpoints: Path, plugins: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(
        model: str | Path,
        *options: str,
        ours: bool = True,
        extra_plugins: str = "",
        workers: int = 1,
        until: str = "/health",
        **environment: str,
    ) -> Server:
        directory = tmp_path_factory.mktemp("serve")
        # SGLang 0.5.14 and older add 10000 to it, for another server that is not started.
        port = next(port for port in iter(free_port, 0) if port < 55000)
        loaded = ["faults", "checkpoint_engine" if ours else "cpu_identity", *filter(None, extra_plugins.split(","))]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "PS_"))}
        env = {
            **kept,
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": cores(workers),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "SGLANG_PLUGINS": ",".join(loaded),
            "CHECKPOINT_ENGINE_TEST_FAULT_FILE": str(directory / "fault.json"),
            "PYTHONPATH": os.pathsep.join((str(HERE), str(plugins))),
            **environment,
        }
        command = [
            *(sglang_python, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", checkpoints / model),
            *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--grammar-backend", "none"),
            *("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule"),
            *("--mem-fraction-static", "0.1", "--max-total-tokens", "8192", "--sleep-on-idle", *options),
        ]
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=output, env=env, start_new_session=True
            )
        server = Server(f"http://127.0.0.1:{port}", process, log, directory / "fault.json", workers)
        servers.append(server)
        if until:
            server.wait(until)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def update_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `checkpoint-engine update` as a person would, in the parameter server's own environment."""
    return _command("update")


@pytest.fixture(scope="session")
def verify_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `checkpoint-engine verify`, likewise."""
    return _command("verify")


def _command(name: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(directory: Path, server: Server, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        where = ("--endpoint", server.endpoint, "--device", "cpu", "--tensor-parallel-size", server.workers)
        patience = ("--timeout", "120", "--wait", "60")
        return run_command(name, directory, *where, *patience, *options, timeout=240, environment=environment)

    return run
