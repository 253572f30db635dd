"""A `vllm serve` of its own for a measurement or a check, and updates of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from engine_trainer import TimedEndpoint

from checkpoint_engine.deadline import Deadline
from checkpoint_engine_vllm import VllmClient

HERE = Path(__file__).parent
PROMPTS = [[3, 17, 42, 99], [7] * 9, list(range(100, 130))]
START_SECONDS = 300.0


class Server:
    """A running `vllm serve`."""

    def __init__(self, model: Path, port: int, log: Path, *options: str, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "bench", "--dtype", "bfloat16"]
        command += ["--worker-extension-cls", "checksum_extension.ChecksumExtension", *options]
        # What is timed first is the proof, whatever ran here before.
        environment = {"CHECKPOINT_ENGINE_PROOFS": "off", **os.environ, "VLLM_SERVER_DEV_MODE": "1", **environment}
        environment["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.client = VllmClient(self.url, timeout=60.0)
        self.client.endpoint = self.timed = TimedEndpoint(self.url)

    def wait(self) -> None:
        """Waits until it serves; shows the end of its log if it ends instead."""
        deadline = Deadline(START_SECONDS)
        while not deadline.expired and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(0.5)
        raise SystemExit(f"vLLM did not start:\n{self.log.read_text()[-6000:]}")

    def rpc(self, method: str) -> list[object]:
        """Runs a method on all workers."""
        reply = httpx.post(f"{self.url}/collective_rpc", json={"method": method}, timeout=120)
        reply.raise_for_status()
        return reply.json()["results"]

    def post(self, path: str) -> None:
        """A request without a body."""
        httpx.post(f"{self.url}{path}", timeout=120).raise_for_status()

    def tokens(self) -> list[str]:
        """Greedy continuations, with their token ids where this vLLM tells them."""
        texts = []
        for prompt in PROMPTS:
            body = {"model": "bench", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            reply = httpx.post(f"{self.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=120)
            reply.raise_for_status()
            choice = reply.json()["choices"][0]
            texts.append(str(choice.get("token_ids") or choice["text"]))
        return texts

    def state(self) -> dict[str, object]:
        """All that two engines with the same weights must have in common."""
        return {"checksum": self.rpc("checkpoint_engine_checksum"), "tokens": self.tokens()}

    def close(self) -> None:
        """Ends it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(
    models: list[Path], work: Path, *options: str, port: int = 8100, **environment: str
) -> Iterator[list[Server]]:
    """Several servers, started side by side."""
    servers = [
        Server(m, port + i, work / f"serve-{m.name}-{i}.log", *options, **environment) for i, m in enumerate(models)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # else whoever stops this leaves them behind
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.close()
