"""A running SGLang, as tests talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.core.streams import TokenStream
from tests.processes import remove_unmapped

PROMPTS = ["Hello, my name is", "The capital of France is", "The quick brown fox"]
START_SECONDS = 240
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Server:
    """A running SGLang."""

    endpoint: str
    process: subprocess.Popen[bytes]
    log: Path
    fault_file: Path
    workers: int
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.endpoint, timeout=60)

    def wait(self, path: str, status: int = 200, seconds: float = START_SECONDS) -> httpx.Response:
        """Until a path is answered with this status."""
        end, seen = time.monotonic() + seconds, "nothing"
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                reply = self.http.get(path, timeout=10)
                if reply.status_code == status:
                    return reply
                seen = f"{reply.status_code} {reply.text}"
            time.sleep(0.2)
        raise AssertionError(f"{path} did not answer {status} but {seen}:\n{self.log.read_text()[-4000:]}")

    def status(self) -> dict[str, Any]:
        reply = self.http.get("/checkpoint_engine/status")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def tokens(self, length: int = 12) -> list[list[int]]:
        """Greedy tokens for a few prompts, one after the other and without a cache: rounding depends on both."""
        parameters = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        found = []
        for prompt in PROMPTS:
            assert self.http.post("/flush_cache", params={"timeout": 10}).status_code == 200
            reply = self.http.post("/generate", json={"text": prompt, "sampling_params": parameters})
            assert reply.status_code == 200, reply.text
            found.append(reply.json()["output_ids"])
        return found

    def weight_version(self) -> str:
        return self.http.get("/model_info").json()["weight_version"]

    def checksums(self) -> list[dict[str, str]]:
        """Of every parameter and buffer, by rank; nothing where SGLang has none (0.5.11): tokens must do there."""
        reply = self.http.post("/weights_checker", json={"action": "checksum"}).json()
        if not reply["success"] and "Unsupported action='checksum'" in reply.get("message", ""):
            return []
        assert reply["success"], reply
        return [rank["checksums"] for rank in reply["ranks"]]

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens(), "checksums": self.checksums()}

    def fault(self, **fault: Any) -> None:
        """From now on, until it is called with nothing."""
        new = self.fault_file.with_suffix(".new")
        new.write_text(json.dumps(fault))
        new.rename(self.fault_file)

    def close(self) -> None:
        self.http.close()
        # SGLang takes seven seconds to end when it is asked to; the test of that asks.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        remove_unmapped(SHARED_MEMORY.glob("*sglang*"))


class Stream(TokenStream):
    """A generation of a running SGLang."""

    def __init__(self, server: Server, length: int, **request: Any) -> None:
        self.finish: dict[str, Any] | None = None
        parameters = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        super().__init__(
            f"{server.endpoint}/generate",
            {"text": PROMPTS[0], "sampling_params": parameters, "stream": True, **request},
        )

    def take(self, answer: dict[str, Any]) -> None:
        self.tokens = answer["output_ids"]
        self.finish = answer["meta_info"]["finish_reason"]
