"""A parameter server whose tensors lie outside the staging memory, hoping to have other memory loaded."""

from victim import attack_worker, begin, expect_accepted, load_and_finish

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import open_device
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.messages import Load, TensorSlice


def send(channel: SenderChannel, tensor: TensorSlice, offset: int) -> None:
    staging = open_device("cpu").allocate(4096)
    channel.send(begin(4096, (tensor,)), Deadline(5.0), staging.descriptors)
    staging.close()
    expect_accepted(channel)
    load_and_finish(channel, Load(0, offset))


attack_worker(lambda channel: send(channel, TensorSlice("x", "uint8", (16,), 4090), 0))
attack_worker(lambda channel: send(channel, TensorSlice("x", "uint8", (16,), -16), 0))
attack_worker(lambda channel: send(channel, TensorSlice("x", "uint8", (16,), 0), 1 << 62))
attack_worker(lambda channel: send(channel, TensorSlice("x", "uint8", (-4, -4), 0), 0))
attack_worker(lambda channel: send(channel, TensorSlice("x", "uint8", (1 << 62, 4), 0), 0))
