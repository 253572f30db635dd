"""What connects the ranks of one parameter server: a hub on rank 0, and a spoke on each."""

from __future__ import annotations

import atexit
from collections.abc import Sequence

import torch.distributed as dist

from checkpoint_engine.collective.board import Board
from checkpoint_engine.collective.hub import Hub
from checkpoint_engine.collective.meeting import Meeting
from checkpoint_engine.collective.rank_store import RankStore
from checkpoint_engine.collective.spoke import Spoke
from checkpoint_engine.deadline import Cancel, Deadline

__all__ = ["ControlPlane"]


class ControlPlane:
    """One rank's part; `close` lets the others read what they came for."""

    def __init__(self, rank: int, world_size: int, meeting: Meeting | None) -> None:
        """Opens the hub on rank 0, and begins to connect everywhere.

        Args:
            rank: This rank.
            world_size: Number of ranks.
            meeting: Where they meet; None for a rank that is alone.

        Raises:
            AddressInUseError: rank 0 cannot have the place.
            SettingError: the place cannot be opened.
        """
        self.rank = rank
        self.world_size = world_size
        self._hub = Hub(meeting, world_size) if meeting is not None and rank == 0 else None
        self._spoke = Spoke(meeting, rank, world_size) if meeting is not None else None
        self.store: dist.Store = RankStore(self._spoke) if self._spoke is not None else dist.HashStore()
        """What torch's libraries connect their groups by; it lives as long as this object."""
        self._open = True
        atexit.register(self.close)

    def board(self, members: Sequence[int] | None = None) -> Board:
        """The board of some ranks, this one among them; of all if None."""
        everybody = range(self.world_size)
        members = everybody if members is None else members
        return Board(self._spoke, members, list(members).index(self.rank), everybody=list(members) == list(everybody))

    def wait_until_connected(self, deadline: Deadline) -> None:
        """Waits until this rank has met rank 0.

        Raises:
            DeadlineError: it has not in time.
            SettingError: it never will.
        """
        if self._spoke is not None:
            self._spoke.wait_until_connected(deadline, Cancel())

    def close(self) -> None:
        """Leaves the other ranks."""
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            if self._hub is not None:
                self._hub.close()
            if self._spoke is not None:
                self._spoke.close()
