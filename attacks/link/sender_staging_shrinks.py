"""A parameter server that takes its staging memory away after the engine has mapped it, hoping for SIGBUS."""

import os

from victim import attack_worker, begin, expect_accepted, load_and_finish

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.messages import Load, TensorSlice


def attack(channel: SenderChannel) -> None:
    memory = os.memfd_create("shrinking")
    os.ftruncate(memory, 1 << 20)
    channel.send(begin(1 << 20, (TensorSlice("x", "uint8", (1 << 20,), 0),)), Deadline(5.0), (memory,))
    expect_accepted(channel)
    os.ftruncate(memory, 0)
    load_and_finish(channel, Load(0, 0))


attack_worker(attack)
