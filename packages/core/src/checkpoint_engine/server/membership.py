"""A rank's place among the ranks of its parameter server: connected on demand, left at the end."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from checkpoint_engine import distributed
from checkpoint_engine.collective import ControlPlane, RankGroup, connect_ranks
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, CheckpointStateError

__all__ = ["Membership"]

_TIMEOUT = timedelta(minutes=10)
_TORCHRUN = "TORCHELASTIC_RUN_ID"


class Membership:
    """Connects one rank with the others, in a group of their own."""

    def __init__(
        self, rank: int, world_size: int, *, master_addr: str | None, master_port: int | None, automatic: bool
    ) -> None:
        """Does not connect yet.

        Args:
            rank: This rank.
            world_size: Number of ranks.
            master_addr: Host of rank 0; `MASTER_ADDR` if None.
            master_port: A free port there; `MASTER_PORT` if None.
            automatic: Whether `group` connects when that was not done yet.
        """
        self._rank = rank
        self._world_size = world_size
        self._master = (master_addr, master_port)
        self._automatic = automatic
        self._plane: ControlPlane | None = None
        self._group: RankGroup | None = None
        self._facade: distributed.DistributedProcessGroup | None = None
        self._exported = False
        self._only_for_this_call = False

    @property
    def group(self) -> RankGroup:
        """The group of all ranks.

        Raises:
            CheckpointStateError: they are not connected.
        """
        if self._group is None:
            self._connect_by_itself()
        if self._group is None:
            raise CheckpointStateError("the group of ranks was closed")
        return self._group

    def connect(self, master_addr: str | None, master_port: int | None, timeout: timedelta) -> bool:
        """Connects this rank with rank 0; returns whether it was not connected yet.

        Raises:
            SettingError: no address is known.
            AddressInUseError: the port on rank 0 is taken.
            DeadlineError: rank 0 did not come in time.
        """
        if self._plane is not None:
            return False
        plane = self._open(master_addr, master_port, timeout)
        try:
            plane.wait_until_connected(Deadline(timeout.total_seconds()))
        except CheckpointEngineError:
            self.leave()
            raise
        return True

    def _open(self, master_addr: str | None, master_port: int | None, timeout: timedelta) -> ControlPlane:
        """Begins to connect; whoever waits for another rank then does so with a deadline of its own."""
        known_addr, known_port = self._master
        plane = connect_ranks(self._rank, self._world_size, master_addr or known_addr, master_port or known_port)
        self._plane, self._group = plane, RankGroup(plane)
        # Update scripts call checkpoint_engine.distributed.barrier() once they are connected.
        self._facade = distributed.adopt(plane, timeout)
        return plane

    def _connect_by_itself(self) -> None:
        """For callers who never connect: by the default group that they have; under torchrun they get one.

        Raises:
            CheckpointStateError: the ranks are to be connected by hand.
        """
        if not self._automatic and self._world_size > 1 and not self._is_the_default_group():
            raise CheckpointStateError("the ranks are not connected; call init_process_group on all ranks first")
        self._open(None, None, _TIMEOUT)
        if self._automatic and os.environ.get(_TORCHRUN):
            self.export_default_group(_TIMEOUT)
            self._only_for_this_call = self._exported

    def _is_the_default_group(self) -> bool:
        return dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) == (self._rank, self._world_size)

    def end_default_group(self) -> None:
        """Ends the default group that torch got because `group` was asked for; scripts may make one of their own."""
        if self._only_for_this_call:
            distributed.take_back_default_group()
            self._exported = self._only_for_this_call = False

    def export_default_group(self, timeout: timedelta) -> None:
        """Gives torch a default group where scripts expect one; see `ParameterServer.init_process_group`."""
        if self._plane is not None:
            self._exported = distributed.export_default_group(self._plane, timeout)

    def leave(self) -> None:
        """Leaves the group, if this rank is in one."""
        if self._plane is None or self._group is None:
            return
        self._group.drop_communicators()
        distributed.destroy_process_group(self._facade)
        if self._exported:
            distributed.take_back_default_group()
            self._exported = False
        self._plane.close()
        self._plane = self._group = None
