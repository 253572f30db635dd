"""Engine workers and ranks as processes of their own."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from checkpoint_engine.device import open_device
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.server.parameter_server import ParameterServer
from tests.core.cluster import TIMEOUT, Recorder
from tests.core.forked import Forked


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What tells contents apart; cheap to send."""
    return {
        name: hashlib.sha256(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


class _Process(Forked):
    def stagings(self) -> set[str]:
        """Staging memory that it has mapped, as inode numbers."""
        return stagings_of(self.pid)

    def segments(self) -> set[str]:
        """Host memory of checkpoints that it has mapped, likewise."""
        return mapped_by(self.pid, "checkpoint-engine-segment")

    def is_stopped(self) -> bool:
        """Whether all its threads have followed a SIGSTOP."""
        states = [
            file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{self.pid}/task").glob("*/stat")
        ]
        return set(states) == {"T"}


class Worker(_Process):
    """An engine worker. Call it with a handle: it takes the update and returns digests of what came."""

    def __init__(self, rank: int = 0, device: str = "cpu") -> None:
        super().__init__(_work, rank, device)

    def __call__(self, handle: str) -> dict[str, str]:
        self.say(handle)
        return self.hear()  # pyright: ignore[reportReturnType]


class Rank(_Process):
    """The only rank of a parameter server, which holds some tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], staging: str) -> None:
        super().__init__(_serve, {name: tensor.tolist() for name, tensor in tensors.items()}, staging)

    def update(self, worker: Worker) -> dict[str, str]:
        self.say("update")
        handle = self.hear()
        with ThreadPoolExecutor(1) as pool:
            loaded: Future[dict[str, str]] = pool.submit(worker, handle)  # pyright: ignore[reportArgumentType]
            self.hear()
            return loaded.result(TIMEOUT)


def stagings_of(pid: int) -> set[str]:
    """Staging memory that a process has mapped, as inode numbers, which the kernel does not soon use twice."""
    return mapped_by(pid, "checkpoint-engine-staging")


def mapped_by(pid: int, name: str) -> set[str]:
    """Anonymous files of that name that a process has mapped, as inode numbers."""
    gc.collect()  # errors of earlier tests hold on to what their frames had mapped
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if f"memfd:{name}" in line}


def _work(pipe: Connection, rank: int, kind: str) -> None:
    torch.set_num_threads(1)
    device = open_device(kind, rank=rank)
    recorder = Recorder()
    while True:
        try:
            handle = pipe.recv()
        except EOFError:
            return
        try:
            receive_update(handle, recorder, device, timeout=TIMEOUT)
            pipe.send(digests(recorder.loaded))
        except Exception as error:  # noqa: BLE001 - the test gets it
            pipe.send(error)


def _serve(pipe: Connection, tensors: Mapping[str, list[int]], staging: str) -> None:
    torch.set_num_threads(1)
    with ParameterServer(rank=0, world_size=1, device="cpu", staging=staging) as server:
        content = {name: torch.tensor(values, dtype=torch.uint8) for name, values in tensors.items()}
        server.register_checkpoint("a", named_tensors=content)
        server.gather_metas("a")
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            try:
                server.update("a", lambda handles: pipe.send(handles[0][1]), timeout=timedelta(seconds=TIMEOUT))
                pipe.send("done")
            except Exception as error:  # noqa: BLE001 - the test gets it
                pipe.send(error)
