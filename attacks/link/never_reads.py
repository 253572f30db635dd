"""A worker that is let in and then reads nothing, while the rank has megabytes to say."""

import socket

from victim import attack_with_token, begin

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.messages import TensorSlice


def announce(channel: SenderChannel) -> None:
    tensors = tuple(TensorSlice(f"model.layers.{i}.mlp.weight", "bfloat16", (8, 8), 0) for i in range(100_000))
    channel.send(begin(0, tensors), Deadline(1.0))


def attack(worker: socket.socket) -> None:
    pass


attack_with_token(attack, announce)
