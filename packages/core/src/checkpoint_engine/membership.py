"""A rank's place among the ranks of its parameter server: connected on demand, left at the end."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store

from checkpoint_engine import distributed
from checkpoint_engine.collective import RankGroup, open_store
from checkpoint_engine.errors import CheckpointStateError


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
        self._group: RankGroup | None = None
        self._facade: distributed.DistributedProcessGroup | None = None
        self._lent = False

    @property
    def group(self) -> RankGroup:
        """The group of all ranks.

        Raises:
            CheckpointStateError: they are not connected.
        """
        if self._group is None:
            if not self._automatic:
                raise CheckpointStateError("the ranks are not connected; call init_process_group on all ranks first")
            self.connect()
        if self._group is None:
            raise CheckpointStateError("the group of ranks was closed")
        return self._group

    def connect(
        self, master_addr: str | None = None, master_port: int | None = None, timeout: timedelta = timedelta(minutes=10)
    ) -> Store | None:
        """Connects the ranks; returns their store, None if they were connected already.

        Raises:
            SettingError: no address is known.
            AddressInUseError: the port on rank 0 is taken.
            DeadlineError: not all ranks came in time.
        """
        if self._group is not None:
            return None
        known_addr, known_port = self._master
        store = open_store(self._rank, self._world_size, master_addr or known_addr, master_port or known_port, timeout)
        self._group = RankGroup(store, self._rank, self._world_size)
        # Update scripts call checkpoint_engine.distributed.barrier() once they are connected.
        self._facade = distributed.adopt(store, self._rank, self._world_size, timeout)
        return store

    def lend_default_group(self, store: Store, timeout: timedelta) -> None:
        """Gives torch a default group where scripts expect one; see `ParameterServer.init_process_group`."""
        self._lent = distributed.lend_default_group(store, self._rank, self._world_size, timeout)

    def leave(self) -> None:
        """Leaves the group, if this rank is in one."""
        if self._group is None:
            return
        self._group.drop_communicators()
        self._group.board.leave()
        self._group = None
        distributed.destroy_process_group(self._facade)
        if self._lent:
            distributed.take_back_default_group()
            self._lent = False
