"""Ranks in the test process that hold checkpoints in host memory, and bring them to a real engine in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.source.directory import find_files
from tests.ports import free_port

__all__ = ["Sender"]

SECONDS = 60.0


class Updated(Protocol):
    """The client of an engine."""

    def update_weights(
        self, handles: Mapping[str, str], *, version: str, pause: str, reset_caches: bool, timeout: float
    ) -> None: ...


class Sender:
    """As many ranks as the engine has workers; a checkpoint is called what its directory is."""

    def __init__(self, client: Updated, size: int = 1) -> None:
        port = free_port()
        self._client = client
        self._servers = [
            ParameterServer(rank=rank, world_size=size, device="cpu", master_addr="127.0.0.1", master_port=port)
            for rank in range(size)
        ]
        self._pool = ThreadPoolExecutor(size)

    def hold(self, directory: Path) -> None:
        """Registers it beside what is registered."""
        files = find_files(directory)

        def register(server: ParameterServer) -> None:
            server.register_checkpoint(directory.name, files=files[server.rank :: len(self._servers)])
            server.gather_metas(directory.name)

        list(self._pool.map(register, self._servers))

    def update(self, name: str, method: str) -> None:
        """Brings what is held by that name."""
        for failure in self._failures(name, method, "auto"):
            raise failure

    def fails_and_goes_back(self, name: str, old: str, method: str, phase: str = "load") -> None:
        """An update into an engine that a test has broken, by its loader."""
        failures = self._failures(name, method, "loader")
        assert len(failures) == len(self._servers)
        for failure in failures:
            assert "a fault made by the test" in str(failure)
            assert f"rolled back: all workers hold version {old!r} again" in str(failure)
            assert (failure.phase, failure.rolled_back, failure.held) == (phase, old, "old")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        self._pool.shutdown()

    def _failures(self, name: str, method: str, reload: str) -> list[UpdateError]:
        def update(server: ParameterServer) -> UpdateError | None:
            how = {"timeout": timedelta(seconds=SECONDS), "method": method, "reload": reload}
            try:
                server.update(name, self._asker(name, server.rank), **how)  # pyright: ignore[reportArgumentType]
            except UpdateError as error:
                return error
            return None

        return [failure for failure in self._pool.map(update, self._servers) if failure is not None]

    def _asker(self, version: str, rank: int) -> Callable[[list[tuple[str, str]]], None]:
        def ask(handles: list[tuple[str, str]]) -> None:
            if rank == 0:
                self._client.update_weights(
                    dict(handles), version=version, pause="keep", reset_caches=True, timeout=SECONDS
                )

        return ask
