"""Looks for the ranks' store as torch's launcher makes it, to read what they tell each other and to write over it."""

import contextlib
import sys
from datetime import timedelta

import torch.distributed as dist
from victim import attack


def knock(address: str, port: int) -> str:
    with contextlib.suppress(RuntimeError):
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
        sys.exit(f"NOT REFUSED: there is a store, of {store.num_keys()} keys, and nobody asks who we are")
    return "there is no store"


attack(knock)
