"""The ranks that work together: how they number their calls, exchange messages, and which communicators they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from checkpoint_engine.background import in_background
from checkpoint_engine.collective.base import Communicator, open_communicator
from checkpoint_engine.collective.control_plane import ControlPlane
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError

__all__ = ["RankGroup", "failure_key"]

_SHORTEST_SECONDS = 0.1
_TICK_SECONDS = 0.05


def failure_key(call: str) -> str:
    """Where the first rank that fails in a call says so."""
    return f"{call}/failure"


class RankGroup:
    """All ranks over one control plane. Ranks make their calls together and in the same order."""

    def __init__(self, plane: ControlPlane) -> None:
        self.board = plane.board()
        self._plane = plane
        self._calls = 0
        self._communicators: dict[str, Communicator] = {}
        self._generation = ""
        self._members: tuple[int, ...] = ()

    def next_call(self, deadline: Deadline, cancel: Cancel) -> str:
        """The name of the next call, the same on all ranks.

        A call that failed because another rank did not come is passed over by that rank.

        Raises:
            DeadlineError: this rank has not met rank 0 in time.
            RankError: rank 0 is lost.
            SettingError: it cannot be reached as things are set.
            CheckpointEngineError: the cause with which `cancel` was set meanwhile.
        """
        self.board.catch_up(deadline, cancel)
        self._calls += 1
        while self.board.read(failure_key(f"call-{self._calls}")) is not None:
            self._calls += 1
        return f"call-{self._calls}"

    def gather(self, what: str, mine: bytes, timeout: timedelta, waiting_for: str) -> list[bytes]:
        """One call in which every rank brings something; returns all of it in order of rank.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
            RankError: a rank is lost, or gave this call up.
        """
        deadline = Deadline(timeout.total_seconds())
        call = self.next_call(deadline, Cancel())
        try:
            return self.board.gather(f"{call}/{what}", mine, deadline, Cancel(), waiting_for, unless=failure_key(call))
        except CheckpointEngineError as error:
            failure = Failure.of(error, Phase.GATHER, self.board.rank)
            self.board.post(failure_key(call), msgspec.json.encode(failure))
            raise

    def generation_of(self, members: Sequence[int]) -> str:
        """Of the communicators among these ranks that are open; ranks must agree on it before they use them."""
        return self._generation if tuple(members) == self._members else ""

    def communicator(
        self,
        backend: str,
        device: torch.device,
        active: Callable[[], AbstractContextManager[object]],
        generation: str,
        deadline: Deadline,
        members: Sequence[int],
        cancel: Cancel,
    ) -> Communicator | None:
        """The communicator of that generation for tensors of this device; None for a single rank, which needs none.

        `members` are the ranks that it connects, this one among them; it counts them in this order. `active` makes the
        device the calling thread's own.

        Raises:
            RankError: a rank did not come in time.
            CheckpointEngineError: the cause with which `cancel` was set meanwhile.
        """
        if len(members) == 1:
            return None
        if (generation, tuple(members)) != (self._generation, self._members):
            self.drop_communicators()
            self._generation, self._members = generation, tuple(members)
        timeout = timedelta(seconds=max(deadline.remaining, _SHORTEST_SECONDS))
        if backend not in self._communicators:
            store = dist.PrefixStore(f"{generation}/{backend}", self._plane.store)
            place = self._members.index(self.board.rank)

            def opening() -> Communicator:
                with active():
                    return open_communicator(backend, store, place, len(members), timeout, device)

            # Libraries wait for a host that is lost as long as they may, and hear of nothing meanwhile.
            opened = in_background(opening, "checkpoint-engine-connect")
            while not wait([opened], _TICK_SECONDS).done:
                cancel.check()
            self._communicators[backend] = opened.result()
        self._communicators[backend].set_timeout(timeout)
        return self._communicators[backend]

    def drop_communicators(self) -> None:
        """Closes them; peers that wait in one get an error at once."""
        for communicator in self._communicators.values():
            communicator.close()
        self._communicators.clear()
        self._generation, self._members = "", ()
