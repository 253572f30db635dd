"""Starting an engine with the weights of running replicas, out of their parameter servers' memory."""

from __future__ import annotations

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.planning.peers import check_same
from checkpoint_engine.receiver.pulling import Pull
from checkpoint_engine.server.metas import read_metas

__all__ = [
    "Catalog",
    "Pull",
    "check_same",
    "read_metas",
]
