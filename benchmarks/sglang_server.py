"""An SGLang of its own for a measurement or a check, and updates of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from checkpoint_engine.deadline import Deadline
from checkpoint_engine_sglang import SGLangClient, routes

PROMPTS = [[3, 17, 42, 99], [7] * 9, list(range(100, 130))]
START_SECONDS = 300.0
FLUSH_SECONDS = 15.0
PORTS = 10
"""From one server to the next."""

# On a GPU: attention and sampling without kernels that nvcc would compile first, and few graphs, captured in seconds.
DEVICE_OPTIONS = {
    "cuda": [
        *("--attention-backend", "triton", "--mm-feature-transport", "cpu", "--cuda-graph-max-bs-decode", "8"),
        *("--cuda-graph-backend-prefill", "disabled"),
    ],
    "cpu": ["--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule", "--sleep-on-idle"],
}
DEVICE_ENVIRONMENT = {"cuda": {}, "cpu": {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0"}}
CLOSED = ["--load-format", "dummy", "--wait-for-initial-weights"]


class Server:
    """A running SGLang."""

    def __init__(self, model: Path, port: int, log: Path, device: str, options: Sequence[str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.closed = "--wait-for-initial-weights" in options
        """Whether it starts without weights, and answers nobody before the first update."""
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--nccl-port", str(port + 1), "--dtype", "bfloat16", "--random-seed", "1"]
        command += ["--sampling-backend", "pytorch", "--grammar-backend", "none", "--max-running-requests", "16"]
        command += ["--mem-fraction-static", "0.8", "--max-total-tokens", "8192", *DEVICE_OPTIONS[device], *options]
        environment = {"SGLANG_PLUGINS": "checkpoint_engine", **os.environ, **DEVICE_ENVIRONMENT[device]}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.client = SGLangClient(self.url, timeout=60.0)

    def wait(self) -> None:
        """Waits until it serves, or can be updated if it is closed; shows the end of its log if it ends instead."""
        deadline = Deadline(START_SECONDS)
        while not deadline.expired and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                path = routes.STATUS if self.closed else "/health"
                if httpx.get(f"{self.url}{path}", timeout=20).is_success:
                    return
            time.sleep(0.5)
        raise SystemExit(f"SGLang did not start:\n{self.log.read_text()[-6000:]}")

    def post(self, path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        """What it answers."""
        reply = httpx.post(f"{self.url}{path}", json=body, timeout=120)
        reply.raise_for_status()
        return reply.json()

    def flush(self) -> None:
        """Empties the cache: the tokens of a prompt whose beginning is cached may differ by rounding."""
        deadline = Deadline(FLUSH_SECONDS)
        while not httpx.post(f"{self.url}/flush_cache", params={"timeout": 5}, timeout=30).is_success:
            deadline.check("a request that has just ended")
            time.sleep(0.1)

    def tokens(self) -> list[list[int]]:
        """Greedy continuations, one after the other: rounding depends on what is computed together."""
        found = []
        for prompt in PROMPTS:
            self.flush()
            sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
            found.append(self.post("/generate", {"input_ids": prompt, "sampling_params": sampling})["output_ids"])
        return found

    def checksums(self) -> list[dict[str, str]]:
        """Of every parameter and buffer, by worker."""
        return [rank["checksums"] for rank in self.post("/weights_checker", {"action": "checksum"})["ranks"]]

    def state(self) -> dict[str, Any]:
        """All that two engines with the same weights must have in common."""
        return {"checksums": self.checksums(), "tokens": self.tokens()}

    def status(self) -> dict[str, Any]:
        """What the plugin says of it."""
        return httpx.get(f"{self.url}{routes.STATUS}", timeout=20).raise_for_status().json()

    def graphs(self) -> int:
        """How often it has captured CUDA graphs."""
        return len(re.findall(r"Capture .*graph end", self.log.read_text(errors="replace")))

    def close(self) -> None:
        """Ends it, and whatever it started."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(
    models: Sequence[Path],
    work: Path,
    *options: str,
    closed: Path | None = None,
    port: int = 31000,
    device: str = "cuda",
) -> Iterator[list[Server]]:
    """Several servers, started side by side; the last one without weights if `closed` says of which model."""
    starts = [(model, list(options)) for model in models]
    if closed is not None:
        starts.append((closed, [*options, *CLOSED]))
    servers = [
        Server(model, port + PORTS * i, work / f"serve-{model.name}-{i}.log", device, own)
        for i, (model, own) in enumerate(starts)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # else whoever stops this leaves them behind
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            server.close()
