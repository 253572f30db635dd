"""A rank that publishes steps with its worker in one process, and in one of them is stuck while it fills."""

from __future__ import annotations

import threading
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from checkpoint_engine.device import open_device
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source import copying, refill
from checkpoint_engine.source.copying import FillPiece
from tests.core.cluster import TIMEOUT, Recorder
from tests.core.forked import Forked


class FillingRank(Forked):
    """Rank 1 of 2: it says that a step has begun to be filled of which nothing but the first piece ever comes."""

    def __init__(self, port: int, tensors: int, numel: int) -> None:
        super().__init__(_publish, port, tensors, numel)


def _publish(pipe: Connection, port: int, tensors: int, numel: int) -> None:
    torch.set_num_threads(1)
    copying._CHUNK = 4 * numel
    weights = {f"of.rank.1.{i}": torch.zeros(numel) for i in range(tensors)}
    device, recorder = open_device("cpu", rank=1), Recorder()

    def stuck_after_one(*arguments: Any) -> list[FillPiece]:
        def stuck(piece: FillPiece) -> FillPiece:
            return FillPiece(piece.start, piece.end, lambda: check(threading.Event().wait(TIMEOUT)), piece.from_device)

        first, *others = copying.pieces_into(*arguments)
        pipe.send("filling")
        return [first, *map(stuck, others)]

    def ask(handles: list[tuple[str, str]]) -> None:
        receive_update(handles[1][1], recorder, device, timeout=TIMEOUT)

    with ParameterServer(rank=1, world_size=2, master_addr="127.0.0.1", master_port=port, device="cpu") as server:
        for step in range(2):
            if step:
                refill.pieces_into = stuck_after_one
            server.publish(
                weights,
                ask,
                version=f"step-{step}",
                method="direct",
                in_place=False,
                timeout=timedelta(seconds=TIMEOUT),
            )


def check(come: bool) -> None:
    """Nothing ever comes."""
    if not come:
        raise TimeoutError("it was not killed")
