"""A worker that is let in, announces an answer of a terabyte and begins to send it."""

import socket

from victim import attack_with_token, framed, in_background

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel


def wait_for_answer(channel: SenderChannel) -> None:
    channel.receive(Deadline(10.0), "the worker accepting")


def attack(worker: socket.socket) -> None:
    in_background(lambda: worker.sendall(framed(bytes(1 << 20), length=1 << 40)))


attack_with_token(attack, wait_for_answer)
