"""Speaks the ranks' own protocol, without their key, and says that it is rank 1."""

import msgspec
import zmq
from victim import attack

from checkpoint_engine.collective.rank_messages import RANK_PROTOCOL, Call, Greet, RankRequest


def pretend(address: str, port: int) -> str:
    context = zmq.Context()
    strangers = [context.socket(zmq.DEALER) for _ in range(2)]
    public, secret = zmq.curve_keypair()
    strangers[1].curve_serverkey, strangers[1].curve_publickey, strangers[1].curve_secretkey = public, public, secret
    for stranger in strangers:
        stranger.linger = 0
        stranger.connect(f"tcp://{address}:{port}")
        stranger.send(msgspec.msgpack.encode(Greet(RANK_PROTOCOL, 1, 2, "stranger", 1, "elsewhere")))
        forged = msgspec.msgpack.encode(RankRequest(1, Call.GATHER, "call-1/metas", (0, 1)))
        stranger.send_multipart([forged, b"forged"])
    answered = [bool(stranger.poll(1000)) for stranger in strangers]
    context.destroy(linger=0)
    return "answered" if any(answered) else "not answered"


attack(pretend, between_hosts=True)
