"""A rank on a host of its own, with its engine's worker beside it; does as it is told over standard input.

step N METHOD SECONDS     registers `tensors_of(N)`, dealt out among the ranks, gathers, and updates
share N METAS             holds all of it for others, who find it by METAS
join METAS... SECONDS     updates with what others hold
"""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.device import open_device
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.cluster import Recorder
from tests.core.p2p_processes import tensors_of

DAWDLE = 0.05
"""Seconds that the worker takes for each of some forty buckets."""


class HostRank:
    """The rank."""

    def __init__(self, server: ParameterServer) -> None:
        self._server = server
        self._worker = Recorder()
        self._said = threading.Event()
        self._worker.on_load = self._load

    def obey(self, order: str, *arguments: str) -> None:
        """Raises what an update raises."""
        self._said.clear()
        if order == "step":
            number, method, seconds = arguments
            self._step(int(number), method, timedelta(seconds=float(seconds)))
        elif order == "share":
            self._hold(int(arguments[0]), timedelta(seconds=30))
            self._server.catalog("a").save(Path(arguments[1]))
        else:
            *metas, seconds = arguments
            self._server.load_catalogs([Catalog.load(Path(each)) for each in metas])
            self._server.update("a", self._ask, timeout=timedelta(seconds=float(seconds)))
            self._check(1)

    def _step(self, number: int, method: str, limit: timedelta) -> None:
        self._hold(number, limit)
        self._server.update("a", self._ask, timeout=limit, method=method, rollback=False)
        self._check(number)

    def _hold(self, number: int, limit: timedelta) -> None:
        if "a" in self._server.checkpoints:
            self._server.unregister_checkpoint("a", force=True)
        mine = list(tensors_of(number).items())[self._server.rank :: self._server.world_size]
        self._server.register_checkpoint("a", named_tensors=dict(mine))
        self._server.gather_metas("a", timeout=limit)

    def _ask(self, handles: list[tuple[str, str]]) -> None:
        rank = self._server.rank
        receive_update(handles[rank][1], self._worker, open_device("cpu", rank=rank), timeout=60)

    def _load(self) -> None:
        if not self._said.is_set():
            self._said.set()
            print("loading", flush=True)
        time.sleep(DAWDLE)

    def _check(self, number: int) -> None:
        expected = tensors_of(number)
        if self._worker.loaded.keys() != expected.keys():
            raise SystemExit("tensors are missing")
        if not all(torch.equal(self._worker.loaded[name], tensor) for name, tensor in expected.items()):
            raise SystemExit("what came is not what was sent")


def main() -> None:
    """Obeys until the input ends."""
    with ParameterServer(device="cpu") as server:
        rank = HostRank(server)
        for line in sys.stdin:
            start = time.monotonic()
            try:
                rank.obey(*line.split())
                said = "done"
            except CheckpointEngineError as error:
                said = f"{type(error).__name__} of rank {getattr(error, 'rank', None)}: {error}"
            print(f"{time.monotonic() - start:.2f} {said}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
