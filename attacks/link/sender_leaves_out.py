"""A parameter server that sends one bucket twice and leaves another out, hoping for a half-new engine that serves."""

from victim import attack_worker, begin, expect_accepted, load_and_finish

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import open_device
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.messages import Load, TensorSlice

BUCKETS = tuple((TensorSlice(name, "uint8", (16,), 0),) for name in ("a", "b"))


def send(channel: SenderChannel, *loads: Load) -> None:
    staging = open_device("cpu").allocate(4096)
    channel.send(begin(4096, *BUCKETS), Deadline(5.0), staging.descriptors)
    staging.close()
    expect_accepted(channel)
    load_and_finish(channel, *loads)


attack_worker(lambda channel: send(channel, Load(0, 0), Load(0, 0)))
attack_worker(lambda channel: send(channel, Load(0, 0)))
attack_worker(lambda channel: send(channel, Load(0, 0), Load(1, 0), Load(2, 0)))
