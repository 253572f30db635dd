"""Real vLLM for tests, from the environment that scripts/make_vllm_env.sh makes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.commands import run_command
from tests.cores import core
from tests.environments import python_of
from tests.ports import free_port
from tests.processes import remove_unmapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
CHECKPOINTS = [f"{kind}{variant}" for kind in ("qwen3", "tied", "moe", "mtp") for variant in ("", "-b")]
PROMPTS = ["Hello, my name is", "The capital of France is", "The quick brown fox"]
START_SECONDS = 240
SHARED_MEMORY = Path("/dev/shm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def vllm_bin() -> Path:
    """The `bin` of vLLM's environment."""
    return python_of("vllm").parent


def vllm_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PS_"))}
    return {
        **kept,
        "VLLM_CPU_OMP_THREADS_BIND": core(),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **more,
    }


@pytest.fixture(scope="session")
def checkpoints(vllm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny checkpoints: `qwen3`, `qwen3-b` (another seed) and so on."""
    directory = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([vllm_bin / "python", HERE / "models.py", directory, *CHECKPOINTS], check=True, timeout=120)
    return directory


class EngineProcess:
    """A process of `engine_process.py`; `engine("update", checkpoint=...)` asks it and returns its answer."""

    def __init__(self, python: Path, log: Path, script: str = "engine_process.py") -> None:
        self.log = log
        self._python, self._script = python, script
        self._start()

    def _start(self) -> None:
        reading, writing = os.pipe()
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                [self._python, HERE / self._script, str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writing,),
                text=True,
                env=vllm_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
            )
        os.close(writing)
        self._answers = os.fdopen(reading)

    def __call__(self, do: str, **request: Any) -> dict[str, Any]:
        self.ask(do, **request)
        return self.answer()

    def ask(self, do: str, **request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}, default=str) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code, said = self._process.wait(timeout=30), self.log.read_text()[-4000:]
            self.close()
            self._start()  # for the tests that follow
            raise AssertionError(f"the engine process ended with {code}:\n{said}")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=60)
        self._answers.close()


@pytest.fixture(scope="session")
def engine(vllm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One process in which engines are started one after the other: seconds instead of half a minute each."""
    process = EngineProcess(vllm_bin / "python", tmp_path_factory.mktemp("engine") / "log")
    yield process
    process.close()


@pytest.fixture(scope="session")
def trainers(vllm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EngineProcess]]:
    """Two ranks of a trainer that speaks vLLM's own interface: processes of `trainer_process.py`."""
    logs = tmp_path_factory.mktemp("trainers")
    processes = [EngineProcess(vllm_bin / "python", logs / f"log{rank}", "trainer_process.py") for rank in (0, 1)]
    yield processes
    for process in processes:
        process.close()


@pytest.fixture
def fresh_engine(vllm_bin: Path, tmp_path: Path) -> Iterator[EngineProcess]:
    """A process of its own, in which nothing was done before."""
    process = EngineProcess(vllm_bin / "python", tmp_path / "log")
    yield process
    process.close()


@pytest.fixture(scope="session")
def cold(engine: EngineProcess, checkpoints: Path) -> Callable[..., dict[str, Any]]:
    """What a cold start of a checkpoint generates and computes; each is started once."""
    known: dict[tuple[str, str], dict[str, Any]] = {}

    def start(name: str, **options: Any) -> dict[str, Any]:
        key = (name, json.dumps(options, sort_keys=True, default=str))
        if key not in known:
            engine("start", model=checkpoints / name, **options)
            known[key] = engine("tokens") | engine("state")
        return known[key]

    return start


class Server:
    """A running `vllm serve`, on a port or (`socket_path`) on a Unix socket."""

    def __init__(
        self,
        bin_directory: Path,
        model: Path,
        log: Path,
        *options: str,
        socket_path: Path | None = None,
        **environment: str,
    ) -> None:
        self._socket_path = socket_path
        port = free_port()
        where = ["--uds", socket_path] if socket_path else ["--host", "127.0.0.1", "--port", str(port)]
        self.endpoint = f"unix:{socket_path}" if socket_path else f"http://127.0.0.1:{port}"
        key = environment.get("VLLM_API_KEY")
        self.http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            base_url="http://localhost" if socket_path else self.endpoint,
            transport=httpx.HTTPTransport(uds=str(socket_path) if socket_path else None),
            timeout=120,
        )
        self.log = log
        command = [
            *(bin_directory / "vllm", "serve", model, *where),
            *("--served-model-name", "tiny", "--max-model-len", "4096", "--max-num-seqs", "4", "--enforce-eager"),
            *("--dtype", "bfloat16", "--kv-cache-memory-bytes", str(512 << 20), *options),
        ]
        env = vllm_environment(**{"VLLM_SERVER_DEV_MODE": "1", **environment})
        with log.open("w") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=output, env=env, start_new_session=True
            )

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError, OSError):
                self._knock()
                if self.http.get("/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def _knock(self) -> None:
        """Raises OSError while nobody listens on the Unix socket: httpx does not close a socket that is refused."""
        if self._socket_path is not None:
            with socket.socket(socket.AF_UNIX) as knocking:
                knocking.connect(str(self._socket_path))

    def get(self, path: str) -> Any:
        return self.http.get(path).json()

    def rpc(self, method: str, *args: Any) -> Any:
        body = {"method": method, "args": list(args)}
        reply = self.http.post("/collective_rpc", json=body)
        reply.raise_for_status()
        return reply.json()["results"]

    def tokens(self, length: int = 16) -> list[list[int]]:
        """Greedy tokens for the same prompts as `engine_process.py`."""
        found = []
        for prompt in PROMPTS:
            body = completion(prompt, length)
            reply = self.http.post("/v1/completions", json=body)
            reply.raise_for_status()
            found.append(reply.json()["choices"][0]["token_ids"])
        return found

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
        # vLLM's CPU workers leave their shared memory behind, however they end.
        remove_unmapped(SHARED_MEMORY.glob("vllm_dist_*"))


def completion(prompt: str, length: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@pytest.fixture(scope="module")
def serve(
    vllm_bin: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Starts `vllm serve` of one of the tiny checkpoints (or of any directory); it ends with the module."""
    servers: list[Server] = []

    def start(model: str | Path, *options: str, **environment: Any) -> Server:
        log = tmp_path_factory.mktemp("serve") / "log"
        server = Server(vllm_bin, checkpoints / model, log, *options, **environment)
        servers.append(server)
        server.wait()
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def update() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `checkpoint-engine update` as a person would, in the parameter server's own environment."""
    return _command("update")


@pytest.fixture(scope="session")
def verify() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `checkpoint-engine verify`, likewise."""
    return _command("verify")


def _command(name: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(directory: Path, server: Server, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        where = ("--engine", "vllm", "--endpoint", server.endpoint, "--device", "cpu")
        patience = ("--timeout", "120", "--wait", "60")
        return run_command(name, directory, *where, *patience, *options, timeout=240, environment=environment)

    return run
