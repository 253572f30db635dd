"""`tests/core/test_chaos.py` with two real vLLM servers; cold starts in another process say what is right."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine.deadline import Deadline
from checkpoint_engine_vllm import VllmClient
from tests.core.chaos import SECONDS, Engine, Fleet, run_chaos
from tests.processes import children_of
from tests.vllm.conftest import HERE, Server

FIRST, SECOND = "qwen3", "qwen3-b"
Cold = Callable[..., dict[str, Any]]


@pytest.mark.endurance
@pytest.mark.timeout(SECONDS + 900)
def test_every_server_ends_on_one_version(
    vllm_bin: Path, cold: Cold, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {name: checkpoints / name for name in (FIRST, SECOND)}
    expected = {name: cold(name) for name in versions}
    logs = (tmp_path / f"log-{number}" for number in count())

    def start() -> Engine:
        options = ("--worker-extension-cls", "faulty_extension.FaultyExtension")
        return _VllmEngine(Server(vllm_bin, versions[FIRST], next(logs), *options, PYTHONPATH=str(HERE)), expected)

    run_chaos(Fleet("vllm", versions, start, longest_round=8.0), tmp_path, monkeypatch)


class _VllmEngine(Engine):
    started_with = FIRST

    def __init__(self, server: Server, expected: dict[str, dict[str, Any]]) -> None:
        self._server, self._expected = server, expected
        self.endpoint = server.endpoint

    def wait(self) -> None:
        self._server.wait()
        self.client = VllmClient(self.endpoint).chosen(Deadline(10))
        front = self._server.process.pid
        (core,) = (pid for pid in children_of(front) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
        self.pids = {"front": front, "worker": core}

    def holds(self, version: str) -> bool:
        right = self._expected[version]
        weights = self._server.rpc("checkpoint_engine_test_fingerprint")
        return (weights, self._server.tokens()) == ([right["served"]], right["tokens"])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the engine's core outlives a front that was killed
            os.killpg(self._server.process.pid, signal.SIGKILL)
        self._server.close()
