"""Ranks and engine workers as threads of the test process: real stores, groups, links and memory; no start-up time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from checkpoint_engine.contract.sink import Update
from checkpoint_engine.device import open_device
from checkpoint_engine.receiver.reception import Received, receive_update
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source.shards import NamedTensors
from checkpoint_engine.transfer.methods import Method
from tests.ports import free_port

T = TypeVar("T")
TIMEOUT = 20.0


@dataclass
class Recorder:
    """An adapter that keeps copies of what it is given, and can be told to fail in a phase."""

    fail_in: str = ""
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    update: Update | None = None
    aborts: int = 0
    finishes: int = 0
    buckets: int = 0
    on_load: Callable[[], None] | None = None
    on_finish: Callable[[], None] | None = None

    def begin(self, update: Update) -> None:
        self._maybe_fail("begin")
        self.update = update
        self.loaded.clear()

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.buckets += 1
        if self.on_load is not None:
            self.on_load()
        self._maybe_fail("load")
        for name, tensor in tensors:
            if name in self.loaded:
                raise AssertionError(f"{name} came twice")
            self.loaded[name] = tensor.clone()

    def finish(self) -> Mapping[str, str | int | float]:
        if self.on_finish is not None:
            self.on_finish()
        self._maybe_fail("finish")
        self.finishes += 1
        return {"tensors": len(self.loaded)}

    def abort(self) -> bool:
        self.aborts += 1
        return not self.loaded

    def _maybe_fail(self, phase: str) -> None:
        if phase == self.fail_in:
            raise ValueError(f"told to fail in {phase}")


class Cluster:
    """`size` ranks on the CPU, each with one engine worker that a request function sets off."""

    def __init__(self, size: int) -> None:
        port = free_port()
        self.recorders = [Recorder() for _ in range(size)]
        self.servers = [
            ParameterServer(rank=rank, world_size=size, master_addr="127.0.0.1", master_port=port, device="cpu")
            for rank in range(size)
        ]
        self.received: dict[int, Future[Received]] = {}
        self._pool = ThreadPoolExecutor(2 * size)

    def on_all(self, call: Callable[[ParameterServer], T]) -> list[T | BaseException]:
        """Calls on every rank at once; gives results or errors in order of rank."""
        futures = [self._pool.submit(call, server) for server in self.servers]
        return [future.exception(3 * TIMEOUT) or future.result() for future in futures]

    def register(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Deals the tensors out and gathers."""
        size = len(self.servers)
        for rank, server in enumerate(self.servers):
            share = dict(list(tensors.items())[rank::size])
            server.register_checkpoint(name, named_tensors=share)
        check(self.on_all(lambda server: server.gather_metas(name)))

    def update(self, name: str, timeout: float = TIMEOUT, method: str = Method.BROADCAST) -> list[BaseException | None]:
        """Updates all workers."""
        return self.on_all(
            lambda server: server.update(
                name, self.asker(server.rank), timeout=timedelta(seconds=timeout), method=method
            )
        )

    def publish(self, shares: Sequence[NamedTensors], version: str, method: str, *, in_place: bool = True) -> None:
        """One step; `shares` says what each rank has."""
        check(self.try_to_publish(shares, version, method, in_place=in_place))

    def try_to_publish(
        self, shares: Sequence[NamedTensors], version: str, method: str, *, in_place: bool = True
    ) -> list[BaseException | None]:
        """The same; returns what came of it on each rank."""
        return self.on_all(
            lambda server: server.publish(
                shares[server.rank],
                self.asker(server.rank),
                version=version,
                method=method,
                in_place=in_place,
                timeout=timedelta(seconds=TIMEOUT),
            )
        )

    def publish_files(self, shares: Sequence[Sequence[Path]], version: str, method: str = Method.DIRECT) -> None:
        """The same of files."""
        check(
            self.on_all(
                lambda server: server.publish(
                    {},
                    self.asker(server.rank),
                    files=shares[server.rank],
                    version=version,
                    method=method,
                    timeout=timedelta(seconds=TIMEOUT),
                )
            )
        )

    def asker(self, rank: int) -> Callable[[list[tuple[str, str]]], None]:
        """A request function that runs this rank's worker, as an engine's HTTP request would."""

        def ask(handles: list[tuple[str, str]]) -> None:
            self.received[rank] = Future()
            try:
                result = receive_update(
                    handles[rank][1], self.recorders[rank], open_device("cpu", rank=rank), timeout=TIMEOUT
                )
            except BaseException as error:
                self.received[rank].set_exception(error)
                raise
            self.received[rank].set_result(result)

        return ask

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self._pool.shutdown()


def check(results: Sequence[object]) -> None:
    """Raises the first error among results."""
    for result in results:
        if isinstance(result, BaseException):
            raise result


def assert_no_threads_left() -> None:
    ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-engine-watch")]
    assert not ours, ours
