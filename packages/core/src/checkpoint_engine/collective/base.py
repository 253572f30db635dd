"""Moving tensors between ranks. A communicator is one group of ranks; the registry says which kinds there are."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from checkpoint_engine.errors import SettingError

__all__ = [
    "Communicator",
    "CommunicatorFactory",
    "check_backend",
    "open_communicator",
    "register_communicator",
    "registered_backends",
]


class Communicator(Protocol):
    """A group of ranks of our own; the caller's default group is never touched."""

    rank: int
    world_size: int

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fills `tensor` with that of rank `source`; queued behind the current stream where the device has streams."""
        ...

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Combines `tensor` over all ranks, in place."""
        ...

    def set_timeout(self, timeout: timedelta) -> None:
        """Bounds every later operation."""
        ...

    def abort(self) -> None:
        """Makes every call that hangs in another thread fail; the communicator is of no further use."""
        ...

    def close(self) -> None:
        """Frees the communicator; all ranks do so together."""
        ...


CommunicatorFactory = Callable[[dist.Store, int, int, timedelta, torch.device], Communicator]
"""Makes a communicator from a store that only this group uses, rank, world size, time-out and device.

The time-out bounds the wait for all ranks to come, and later operations until it is set anew.
"""

_FACTORIES: dict[str, CommunicatorFactory] = {}


def register_communicator(backend: str, factory: CommunicatorFactory) -> None:
    """Makes another kind of communicator known, or replaces one."""
    _FACTORIES[backend] = factory


def registered_backends() -> list[str]:
    """Names of all kinds of communicator that are known."""
    return sorted(_FACTORIES)


def check_backend(name: str) -> str:
    """Returns the name of a kind of communicator as it was set; empty for `auto`, which leaves it to the device.

    Raises:
        SettingError: none of that name is registered.
    """
    if name not in ("auto", *_FACTORIES):
        kinds = ", ".join(["auto", *registered_backends()])
        raise SettingError(f"CHECKPOINT_ENGINE_COLLECTIVE is {name!r}; there are {kinds}")
    return "" if name == "auto" else name


def open_communicator(
    backend: str, store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: torch.device
) -> Communicator:
    """Opens a communicator; every rank of the group calls this with a store of the same content.

    Raises:
        SettingError: no communicator of that name is registered.
        RankError: a rank did not come in time.
    """
    if backend not in _FACTORIES:
        raise SettingError(f"no communicator {backend!r} is registered; there are {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[backend](store, rank, world_size, timeout, device)
