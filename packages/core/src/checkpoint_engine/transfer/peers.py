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
    if not any(segment.tensors for segment in holding.segments):
        return Peer(f"rank {holding.rank}", "", "", 0, 0)
    where = f"rank {holding.rank} on {holding.host or 'an unknown host'}"
    if holding.p2p_address is None:
        raise PeerError(
            f"{where} holds a part of it, but does not share its memory: start the seeds with CHECKPOINT_ENGINE_P2P=1 "
            "(or --share) and get their metas anew"
        )
    if not holding.generation:
        raise PeerError(
            f"the metas of {where} lack generation, by which readers know that its memory is still what they say: "
            "get them anew, from ranks of checkpoint-engine-core"
        )
    return Peer(
        where,
        holding.p2p_address,
        holding.transport,
        holding.control_address,
        holding.generation,
    )
