"""Parameter servers as processes of their own, to be killed, halted and moved on: seeds, and one that joins."""

from __future__ import annotations

import threading
import time
from multiprocessing.connection import Connection
from typing import cast

import torch

from checkpoint_engine.catalog import Catalog
from tests.core.cluster import Cluster
from tests.core.forked import Forked

ENVIRONMENT = {
    "PS_MAX_BUCKET_SIZE_GB": str(64 / (1 << 20)),  # 64 KiB
    "CHECKPOINT_ENGINE_P2P": "1",
    "CHECKPOINT_ENGINE_P2P_HOST": "127.0.0.1",
    "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
    "CHECKPOINT_ENGINE_P2P_PATIENCE": "3",
}
"""For all processes of a test, its own included."""


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(10_000 + i, generator=generator) for i in range(40)}


class Seed(Forked):
    """A parameter server of `ranks` ranks in one process; holds `tensors_of(1)` as "a"."""

    def __init__(self, ranks: int = 1) -> None:
        super().__init__(_seed, ranks, environment=ENVIRONMENT)
        self.catalog = self._hear_catalog()

    def move(self) -> Catalog:
        """Makes it hold `tensors_of(2)` in place of what it holds."""
        self.say("move")
        return self._hear_catalog()

    def _hear_catalog(self) -> Catalog:
        return Catalog.from_json(cast("bytes", self.hear()))


class Joiner(Forked):
    """A parameter server that joins, and takes its time over every bucket."""

    def __init__(self, catalog: Catalog) -> None:
        super().__init__(_join, catalog.to_json(), environment=ENVIRONMENT)

    def wait_until_it_loads(self) -> None:
        assert self.hear() == "loading"


def _seed(pipe: Connection, ranks: int) -> None:
    """Says its catalog; whatever it hears makes it hold other values."""
    cluster = Cluster(ranks)

    def show(version: int) -> None:
        cluster.register("a", tensors_of(version))
        pipe.send(cluster.servers[0].catalog("a").to_json())

    show(1)
    while _hears(pipe):
        for server in cluster.servers:
            server.unregister_checkpoint("a")
        show(2)


def _hears(pipe: Connection) -> bool:
    try:
        pipe.recv()
    except EOFError:
        return False
    return True


def _join(pipe: Connection, catalog: bytes) -> None:
    """Joins, and says when the first bucket is there."""
    cluster = Cluster(1)
    said = threading.Event()

    def dawdle() -> None:
        if not said.is_set():
            said.set()
            pipe.send("loading")
        time.sleep(0.2)

    cluster.recorders[0].on_load = dawdle
    cluster.servers[0].load_catalogs([Catalog.from_json(catalog)])
    cluster.servers[0].update("a", cluster.asker(0))
