"""A process that shares memory, to be killed or halted."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import cast

from checkpoint_engine.p2p.open import open_p2p_store
from checkpoint_engine.p2p.store import Peer
from checkpoint_engine.settings import P2PSettings
from checkpoint_engine.source.segment import Segment
from tests.core.forked import Forked


class SeedProcess(Forked):
    """Shares a segment of `nbytes`, which lies at `data` there."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(_share, nbytes)
        self.nbytes = nbytes
        self.peer, self.data = cast("tuple[Peer, int]", self.hear())


def _share(pipe: Connection, nbytes: int) -> None:
    store = open_p2p_store(P2PSettings(share=True, host=None, transport="tcp", patience=30), "127.0.0.1", 0, 0)
    segment = Segment.create(nbytes)
    segment.touch(0, segment.nbytes)
    lease = store.share("a", [segment])
    peer = Peer("rank 0 of seed", store.address, store.transport, lease.control_address, lease.generation)
    pipe.send((peer, lease.segments[0]))
    pipe.poll(None)
