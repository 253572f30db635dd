"""Starts a reference engine as a process of its own, for the demo and for tests."""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import IO, cast

from typing_extensions import Self

from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine.processes import python_module

__all__ = ["ReferenceProcess"]

_SERVER_MODULE = "checkpoint_engine.reference.server"
_END_SECONDS = 10.0


class ReferenceProcess:
    """A running `reference_server`; `endpoint` says where it listens. Ends with this object's `close`."""

    def __init__(
        self,
        spec: str,
        workers: int,
        *,
        device: str = "cpu",
        uds: str | None = None,
        fault: str = "",
        log: IO[bytes] | None = None,
    ) -> None:
        where = ["--uds", uds] if uds else ["--port", "0"]
        self._process = subprocess.Popen(
            [
                *(*python_module(_SERVER_MODULE), "--spec", spec, "--device", device, *where),
                *("--tensor-parallel-size", str(workers), *(["--fault", fault] if fault else [])),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        self._output = cast("IO[bytes]", self._process.stdout)
        words = self._output.readline().decode().split()
        if not words:
            self.close()
            raise EngineRequestError(f"the reference engine ended with exit code {self._process.returncode}")
        self.endpoint = words[-1]

    @property
    def pid(self) -> int:
        """Number of the front's process."""
        return self._process.pid

    def close(self) -> None:
        """Ends the engine with its workers."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
