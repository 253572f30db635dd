"""A rank that does as it is told over standard input, and says what came of it."""

from __future__ import annotations

import ctypes
import sys
import time
from datetime import timedelta

import torch

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.server.parameter_server import ParameterServer


def obey(server: ParameterServer, order: str, limit: timedelta) -> None:
    if order == "gather":
        server.gather_metas("a", timeout=limit)
    elif order == "barrier":
        server.store_based_barrier(limit)
    elif order == "hang":
        ctypes.PyDLL(None).usleep(int(limit.total_seconds() * 1e6))  # as a library call that lets no thread run
    else:
        server.update("a", lambda _: time.sleep(2 * limit.total_seconds()), timeout=limit)


def main() -> None:
    with ParameterServer(device="cpu") as server:
        server.register_checkpoint("a", named_tensors={f"of.rank.{server.rank}": torch.ones(4)})
        for line in sys.stdin:
            order, limit = line.split()
            start = time.monotonic()
            try:
                obey(server, order, timedelta(seconds=float(limit)))
                said = "done"
            except CheckpointEngineError as error:
                said = f"{type(error).__name__} of rank {getattr(error, 'rank', None)}: {error}"
            print(f"{time.monotonic() - start:.2f} {said}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
