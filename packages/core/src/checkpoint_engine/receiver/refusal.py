"""A worker that takes no part in an update tells the parameter server so, which would wait for it all its time."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from checkpoint_engine import limits
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.device import Device
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.link.channel import connect
from checkpoint_engine.link.messages import PROTOCOL, Failed, Hello
from checkpoint_engine.version import __version__

__all__ = ["refuse_update"]


def refuse_update(handles: Mapping[str, str], device: Device, reason: Exception) -> bool:
    """Says why in place of the worker for which a link is still open, whichever that is; one rank tells all others.

    Args:
        handles: As the worker was given them: device -> handle.
        device: The worker's device.
        reason: Why it takes no part; its weights are as they were.

    Returns:
        Whether somebody heard.
    """
    return any(_refuse(handle, device, reason) for handle in handles.values())


def _refuse(handle: str, device: Device, reason: Exception) -> bool:
    deadline = Deadline(limits.WORKER_GOODBYE)
    try:
        channel, token = connect(handle, deadline)
        with channel:
            hello = Hello(
                PROTOCOL, token, device.identity, __version__, str(torch.__version__), os.getpid(), takes_parts=True
            )
            channel.send(hello, deadline)
            channel.receive(deadline, "the start of the update")
            channel.send(Failed(Phase.BEGIN, type(reason).__name__, str(reason), dirty=False), deadline)
    except CheckpointEngineError:
        return False
    return True
