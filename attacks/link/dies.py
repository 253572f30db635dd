"""A worker that is let in, says half a message, and is gone."""

import socket

from victim import attack_with_token, framed

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel


def wait_for_answer(channel: SenderChannel) -> None:
    channel.receive(Deadline(60.0), "the worker accepting")


def attack(worker: socket.socket) -> None:
    worker.sendall(framed(bytes(100))[:50])
    worker.shutdown(socket.SHUT_RDWR)


attack_with_token(attack, wait_for_answer)
