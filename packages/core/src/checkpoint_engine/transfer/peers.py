"""How the holders of a plan's buckets are reached."""

from __future__ import annotations

from checkpoint_engine.catalog import Holding
from checkpoint_engine.errors import PeerError
from checkpoint_engine.p2p.store import Peer
from checkpoint_engine.planning.peers import PeerPlan

__all__ = ["peers_of"]


def peers_of(plan: PeerPlan) -> list[Peer]:
    """How each holder of a plan is reached.

    Raises:
        PeerError: one does not share its memory.
    """
    return [_peer_of(holding) for holding in plan.holders]


def _peer_of(holding: Holding) -> Peer:
    if holding.p2p_address is None or not holding.generation:
        if any(segment.tensors for segment in holding.segments):
            raise PeerError(
                f"rank {holding.rank} on {holding.host or 'an unknown host'} holds a part of it, but does not "
                "share its memory: start the seeds with CHECKPOINT_ENGINE_P2P=1 (or --p2p) and get their metas anew"
            )
        return Peer(f"rank {holding.rank}", "", "", 0, 0)
    return Peer(
        f"rank {holding.rank} on {holding.host}",
        holding.p2p_address,
        holding.transport,
        holding.control_address,
        holding.generation,
    )
