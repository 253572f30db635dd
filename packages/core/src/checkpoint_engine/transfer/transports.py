"""Which transport carries out which order."""

from __future__ import annotations

from collections.abc import Mapping

from checkpoint_engine.transfer.automatic import Automatic
from checkpoint_engine.transfer.broadcast import Broadcast
from checkpoint_engine.transfer.direct import Direct
from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import UpdateOrder
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.transfer.transport import Transport

__all__ = ["TRANSPORTS", "choose_transport"]

TRANSPORTS: Mapping[Method, type[Transport]] = {
    Method.BROADCAST: Broadcast,
    Method.DIRECT: Direct,
    Method.AUTO: Automatic,
    Method.P2P: P2P,
}


def choose_transport(order: UpdateOrder) -> type[Transport]:
    """The transport of the order's method; P2P in its place if others hold the checkpoint, or not all are updated.

    Raises:
        SettingError: the method cannot do what is ordered.
    """
    chosen = TRANSPORTS[order.method]
    if chosen.yields_to_p2p and not order.everywhere:
        chosen = P2P
    chosen.check(order)
    return chosen
