"""A parameter server that announces staging memory and sends no descriptor, or one of something else."""

import os

from victim import attack_worker, begin

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel


def send_nothing(channel: SenderChannel) -> None:
    channel.send(begin(4096), Deadline(5.0))
    channel.receive(Deadline(5.0), "an answer")


def send_a_pipe(channel: SenderChannel) -> None:
    reading, writing = os.pipe()
    channel.send(begin(4096), Deadline(5.0), (reading,))
    os.close(reading)
    os.close(writing)
    channel.receive(Deadline(5.0), "an answer")


attack_worker(send_nothing)
attack_worker(send_a_pipe)
