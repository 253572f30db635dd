"""Parameter servers as processes of their own, to be killed, halted and moved on: seeds, and one that joins.

python p2p_processes.py seed SIZE    prints its catalog; a line "move" makes it hold other values
python p2p_processes.py join         reads a catalog, joins, and says when the first bucket is there
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import torch
from typing_extensions import Self

from checkpoint_engine.catalog import Catalog

ENVIRONMENT = {
    "PS_MAX_BUCKET_SIZE_GB": str(64 / (1 << 20)),  # 64 KiB
    "CHECKPOINT_ENGINE_P2P": "1",
    "CHECKPOINT_ENGINE_P2P_HOST": "127.0.0.1",
    "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
    "CHECKPOINT_ENGINE_P2P_PATIENCE": "2",
}
"""For all processes of a test, its own included."""


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(10_000 + i, generator=generator) for i in range(40)}


class _Process:
    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def signal(self, name: str) -> None:
        os.kill(self._process.pid, signal.Signals[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)


class Seed(_Process):
    """A parameter server of `ranks` ranks in one process; holds `tensors_of(1)` as "a"."""

    def __init__(self, ranks: int = 1) -> None:
        super().__init__("seed", str(ranks))
        self.catalog = self._hear_catalog()

    def move(self) -> Catalog:
        """Makes it hold `tensors_of(2)` in place of what it holds."""
        self.say("move")
        return self._hear_catalog()

    def _hear_catalog(self) -> Catalog:
        return Catalog.from_json(Path(self.hear()).read_bytes())


class Joiner(_Process):
    """A parameter server that joins, and takes its time over every bucket."""

    def __init__(self, catalog: Catalog, directory: Path) -> None:
        super().__init__("join")
        catalog.save(directory / "metas.json")
        self.say(str(directory / "metas.json"))

    def wait_until_it_loads(self) -> None:
        assert self.hear() == "loading"


def _seed(ranks: int) -> None:
    import tempfile

    from cluster import Cluster

    cluster = Cluster(ranks)
    with tempfile.TemporaryDirectory() as directory:

        def show(version: int) -> None:
            cluster.register("a", tensors_of(version))
            path = Path(directory, f"{version}.json")
            cluster.servers[0].catalog("a").save(path)
            print(path, flush=True)

        show(1)
        for _ in sys.stdin:
            for server in cluster.servers:
                server.unregister_checkpoint("a")
            show(2)


def _join() -> None:
    from cluster import Cluster

    cluster = Cluster(1)
    said = threading.Event()

    def dawdle() -> None:
        if not said.is_set():
            said.set()
            print("loading", flush=True)
        time.sleep(0.2)

    cluster.recorders[0].on_load = dawdle
    cluster.servers[0].load_catalogs([Catalog.load(Path(sys.stdin.readline().strip()))])
    cluster.servers[0].update("a", cluster.asker(0))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _seed(int(sys.argv[2])) if sys.argv[1] == "seed" else _join()
    os._exit(0)
