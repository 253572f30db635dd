"""`checkpoint-engine serve` as a process, and clients of its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import httpx
from typing_extensions import Self

from tests.commands import command_line

_END_SECONDS = 15.0


class HttpRanks:
    """A running `serve`; `clients[rank]` speaks to each of its ranks."""

    def __init__(self, arguments: Sequence[str], ranks: int, environment: dict[str, str] | None = None) -> None:
        several = ["--ranks", str(ranks)] if ranks > 1 else []
        self._process = subprocess.Popen(
            command_line("serve", "--device", "cpu", *several, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.clients: dict[int, httpx.Client] = {}
        self.addresses: dict[int, str] = {}
        assert self._process.stdout is not None
        while len(self.clients) < ranks:
            words = self._process.stdout.readline().split()
            if not words:
                self.close()
                raise RuntimeError(self.error_text)
            self.addresses[int(words[1])] = words[-1]
            self.clients[int(words[1])] = client_of(words[-1])

    @property
    def pid(self) -> int:
        return self._process.pid

    def on_all(self, ask: Callable[[int, httpx.Client], httpx.Response]) -> list[httpx.Response]:
        """Asks all ranks at the same time; gives answers in order of rank."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            asked = [pool.submit(ask, rank, self.clients[rank]) for rank in sorted(self.clients)]
            return [answer.result() for answer in asked]

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_END_SECONDS)

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            _, self.error_text = self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def client_of(address: str) -> httpx.Client:
    if address.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=address.removeprefix("unix:"))
        return httpx.Client(transport=transport, base_url="http://rank", timeout=60)
    return httpx.Client(base_url=address, timeout=60)
