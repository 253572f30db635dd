"""The ranks that feed an engine in a measurement: one for each of its workers, the first in this process.

Run as a program, this is one of the others: it follows orders, a line of JSON each, that come on standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from typing_extensions import Self

from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source.directory import select_directory
from checkpoint_engine.source.loader import split_among_ranks
from checkpoint_engine.transfer.order import RequestFunction
from checkpoint_engine.transfer.report import UpdateReport

UPDATE_SECONDS = 300.0
END_SECONDS = 60.0


class Client(Protocol):
    """An engine's client; see its plugin."""

    def update_weights(self, handles: dict[str, str], *, version: str, pause: str, **options: Any) -> Any: ...  # noqa: ANN401, D102 - as the plugin has it


class Senders:
    """All ranks of a parameter server; rank r has the GPU of the engine's worker r."""

    def __init__(self, ranks: int = 1, *, device: str = "cuda", port: int) -> None:
        self._others = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(ranks), device, str(port)], stdin=subprocess.PIPE, text=True
            )
            for rank in range(1, ranks)
        ]
        self._first = start_rank(0, ranks, device, port)

    @property
    def last_report(self) -> UpdateReport:
        """The first rank's report on the last update."""
        if self._first.last_report is None:
            raise RuntimeError("nothing was updated yet")
        return self._first.last_report

    def register(self, directory: Path, *, in_place: bool) -> None:
        """Reads a checkpoint, a share of its files each, and calls it what its directory is called."""
        self._all({"directory": str(directory), "in_place": in_place}, tell_nobody)

    def update(self, client: Client, name: str, way: str, only: Sequence[str] = ()) -> None:
        """One update of one engine; a way is a method and how the engine takes tensors over."""
        method, reload = way.split(":")

        def ask(handles: Sequence[tuple[str, str]]) -> None:
            client.update_weights(dict(handles), version=name, pause="keep", reset_caches=True, timeout=UPDATE_SECONDS)

        self._all({"name": name, "method": method, "reload": reload, "only": list(only)}, ask)

    def close(self) -> None:
        """Ends all ranks."""
        for other in self._others:
            other.stdin.close()
        self._first.close()
        for other in self._others:
            other.wait(END_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, order: Mapping[str, Any], ask: RequestFunction) -> None:
        for other in self._others:
            other.stdin.write(json.dumps(order) + "\n")
            other.stdin.flush()
        follow(self._first, order, ask)


def start_rank(rank: int, ranks: int, device: str, port: int) -> ParameterServer:
    """One rank, which meets the others on this machine."""
    return ParameterServer(rank=rank, world_size=ranks, master_addr="127.0.0.1", master_port=port, device=device)


def follow(ps: ParameterServer, order: Mapping[str, Any], ask: RequestFunction) -> None:
    """One rank's part of what all do together."""
    if "method" in order:
        ps.update(order["name"], ask, method=order["method"], reload=order["reload"], only=order["only"])
        return
    directory = Path(order["directory"])
    files = split_among_ranks(select_directory(directory), ps.world_size)[ps.rank]
    ps.register_checkpoint(directory.name, files=files, use_inplace_pin_memory=order["in_place"])
    ps.gather_metas(directory.name)


def tell_nobody(_: object) -> None:
    """The first rank alone speaks with the engine."""


def main() -> None:
    """A rank that is not the first."""
    rank, ranks, device, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    with start_rank(rank, ranks, device, port) as ps:
        for line in sys.stdin:
            follow(ps, json.loads(line), tell_nobody)


if __name__ == "__main__":
    main()
