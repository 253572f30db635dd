"""A parameter server that announces more staging memory than it hands over, hoping for SIGBUS in the engine."""

import fcntl
import os

from victim import attack_worker, begin, expect_accepted, load_and_finish

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.messages import Load, TensorSlice


def attack(channel: SenderChannel) -> None:
    memory = os.memfd_create("small", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 4096)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    bucket = (TensorSlice("x", "uint8", (1 << 20,), 0),)
    channel.send(begin(1 << 20, bucket), Deadline(5.0), (memory,))
    os.close(memory)
    expect_accepted(channel)
    load_and_finish(channel, Load(0, 0))


attack_worker(attack)
