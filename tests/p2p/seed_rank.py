"""One rank that holds its share of a checkpoint and shares its memory until its input ends.

seed_rank.py DIR METAS      rank 0 writes METAS once all have gathered
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source.directory import select_directory
from checkpoint_engine.source.loader import split_among_ranks


def main() -> None:
    directory, metas = Path(sys.argv[1]), Path(sys.argv[2])
    server = ParameterServer(device="cpu")
    files = split_among_ranks(select_directory(directory), server.world_size)[server.rank]
    server.register_checkpoint(directory.name, files=files)
    server.gather_metas(directory.name)
    if server.rank == 0:
        server.catalog(directory.name).save(metas)
    print("holds", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
