"""A parameter server of four ranks on two hosts, which shares what it holds."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.p2p.hosts import Network

ENVIRONMENT = {
    "PS_MAX_BUCKET_SIZE_GB": str(64 / (1 << 20)),
    "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
    "CHECKPOINT_ENGINE_P2P_PATIENCE": "3",
    "GLOO_SOCKET_IFNAME": "lo",  # ranks of one host meet there; its name leads out of the namespace
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def seeds(network: Network, checkpoint: Path, metas: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks 0 and 1 on host 0, ranks 2 and 3 on host 1."""
    script = str(Path(__file__).with_name("seed_rank.py"))
    processes: list[subprocess.Popen[str]] = []
    secret = secrets.token_hex(32)
    try:
        for rank in range(4):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank % 2),
                "MASTER_ADDR": network.address(0),
                "MASTER_PORT": "29400",
                "CHECKPOINT_ENGINE_RANKS_SECRET": secret,
                "CHECKPOINT_ENGINE_P2P": "1",
            }
            processes.append(
                subprocess.Popen(
                    network.command(rank // 2, [sys.executable, script, str(checkpoint), str(metas)]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | ENVIRONMENT | environment,
                )
            )
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)
