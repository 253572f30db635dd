"""Lets strangers loose on the ranks of a parameter server, and judges whether the ranks noticed."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.server.parameter_server import ParameterServer

MOST_SECONDS = 15.0


def attack(before: Callable[[str, int], object], *, between_hosts: bool = False) -> None:
    """Starts rank 0, lets `before(address, port)` do its worst, then has rank 1 come and both gather.

    Exits unless both know of both ranks' tensors, and of nothing else, in good time.
    """
    port = _free_port()
    if between_hosts:  # as far as the ranks can tell
        os.environ["CHECKPOINT_ENGINE_RANKS_SECRET"] = "a secret of this test alone"
        os.environ.pop("LOCAL_WORLD_SIZE", None)
    address = _own_address() if between_hosts else "127.0.0.1"
    ranks = [
        ParameterServer(rank=rank, world_size=2, master_addr=address, master_port=port, device="cpu") for rank in (0, 1)
    ]
    start = time.monotonic()
    try:
        for rank, server in enumerate(ranks):
            server.register_checkpoint("a", named_tensors={f"of.rank.{rank}": torch.ones(4)})
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(_gather, ranks[0])
            time.sleep(0.2)  # rank 0 waits for rank 1 now
            outcome = before(address, port)
            second = pool.submit(_gather, ranks[1])
            known = [first.result(2 * MOST_SECONDS), second.result(2 * MOST_SECONDS)]
    except CheckpointEngineError as error:
        sys.exit(f"THE RANKS GAVE UP: {type(error).__name__}: {error}")
    finally:
        for server in ranks:
            server.close()
        os.environ.pop("CHECKPOINT_ENGINE_RANKS_SECRET", None)
    if known != [["of.rank.0", "of.rank.1"]] * 2:
        sys.exit(f"NOT REFUSED: the ranks believe {known}")
    print(f"turned away within {time.monotonic() - start:.2f} s: {outcome}")


def meeting_file() -> Path:
    """The file by which ranks of one host and one user find each other."""
    directory = Path(tempfile.gettempdir(), f"checkpoint-engine-ranks-{os.geteuid()}")
    return max((path for path in directory.iterdir() if not path.suffix), key=lambda path: path.stat().st_mtime)


def _gather(server: ParameterServer) -> list[str]:
    server.gather_metas("a", timeout=timedelta(seconds=MOST_SECONDS))
    holdings = server.catalog().holdings
    return sorted(tensor.name for holding in holdings for segment in holding.segments for tensor in segment.tensors)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own_address() -> str:
    """One that is not the loopback's, so that ranks could be on different hosts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])
