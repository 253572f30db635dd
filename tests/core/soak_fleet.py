"""Ranks, workers and seeds of one process that live long, and what that process holds meanwhile."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest
import torch

from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError
from checkpoint_engine.p2p.mooncake import MooncakeEngine
from tests.core.cluster import TIMEOUT, Cluster
from tests.core.p2p_processes import ENVIRONMENT, tensors_of

Way = Literal["broadcast", "direct", "join"]
Fault = Literal["none", "begin", "load", "finish", "deadline", "seed moves on"]


@dataclass
class Fleet:
    """Two ranks with their workers, and two others that can be their seeds; all of them outlive every test here."""

    ranks: Cluster
    seeds: Cluster
    registered: set[tuple[int, int]]
    version: int = 0

    def update(self, way: Way, fault: Fault) -> list[CheckpointEngineError]:
        """Registers new values and updates; gives the ranks' errors, and checks every byte where there are none."""
        self.version += 1
        holders = self.seeds if way == "join" else self.ranks
        tensors = tensors_of(self.version)
        holders.register("a", tensors)
        for server in self.ranks.servers if way == "join" else ():
            server.load_catalogs([self.seeds.servers[0].catalog("a")])
        victim = self.ranks.recorders[self.version % 2]
        timeout = 0.3 if fault == "deadline" else TIMEOUT
        victim.fail_in, victim.on_load = fault, self._on_load(fault)
        answers = self.ranks.on_all(
            lambda server: server.update(
                "a",
                self.ranks.asker(server.rank),
                timeout=timedelta(seconds=timeout),
                method="direct" if way == "direct" else "broadcast",
            )
        )
        victim.fail_in, victim.on_load = "", None
        self._unregister(holders)
        errors = [answer for answer in answers if isinstance(answer, CheckpointEngineError)]
        assert len(errors) in (0, 2), answers
        if not errors:
            for recorder in self.ranks.recorders:
                assert recorder.loaded.keys() == tensors.keys()
                assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors.items())
        return errors

    def left_behind(self) -> dict[str, int]:
        """What this process holds, once everything that ends by itself has ended."""
        until = time.monotonic() + TIMEOUT
        ending = {"checkpoint-engine-retire", "checkpoint-engine-close"}
        while any(thread.name in ending for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.05)
        gc.collect()
        mappings = Path("/proc/self/maps").read_text(encoding="utf-8")
        return {
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            "threads": len(list(Path("/proc/self/task").iterdir())),
            "mapped segments": mappings.count("checkpoint-engine-segment"),
            "registrations": len(self.registered),
        }

    def _on_load(self, fault: Fault) -> Callable[[], None] | None:
        if fault == "deadline":
            return lambda: time.sleep(0.2)
        return (lambda: self._unregister(self.seeds)) if fault == "seed moves on" else None

    @staticmethod
    def _unregister(holders: Cluster) -> None:
        for server in holders.servers:
            with contextlib.suppress(CheckpointStateError):  # it is gone already
                server.unregister_checkpoint("a", force=True)


@contextlib.contextmanager
def open_fleet() -> Iterator[Fleet]:
    registered: set[tuple[int, int]] = set()
    register, unregister = MooncakeEngine.register, MooncakeEngine.unregister

    def registering(engine: MooncakeEngine, address: int, nbytes: int) -> None:
        register(engine, address, nbytes)
        registered.add((id(engine), address))

    def unregistering(engine: MooncakeEngine, address: int) -> None:
        unregister(engine, address)
        registered.discard((id(engine), address))

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in ENVIRONMENT.items():
            patch.setenv(variable, value)
        patch.setattr(MooncakeEngine, "register", registering)
        patch.setattr(MooncakeEngine, "unregister", unregistering)
        fleet = Fleet(Cluster(2), Cluster(2), registered)
        yield fleet
        fleet.ranks.close()
        fleet.seeds.close()
