"""A notice board in the store: ranks exchange small messages on it, and learn that one of them failed."""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Callable

import torch.distributed as dist

from checkpoint_engine.deadline import Cancel, Deadline

_SHORTEST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.02
_PATIENCE_SECONDS = 2.0


class Board:
    """Exchanges bytes between ranks under keys that nobody else uses. No collective library is started for it."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._last = ""
        """Where the others count themselves after the last `gather`; kept by rank 0 only."""

    def gather(self, key: str, mine: bytes, deadline: Deadline, cancel: Cancel, waiting_for: str) -> list[bytes]:
        """Puts up `mine` and returns what all ranks put up under the same key, in order of rank.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
            CheckpointEngineError: the cause with which `cancel` was set meanwhile.
        """
        self._store.set(f"{key}/{self.rank}", mine)  # pyright: ignore[reportArgumentType] - the stub lacks bytes
        if self._store.add(f"{key}/count", 1) == self.world_size:
            self._store.set(f"{key}/all", "1")
        pause = _SHORTEST_PAUSE
        while not self._store.check([f"{key}/all"]):
            if deadline.expired:  # before `cancel`, which the end of the time may have set too: this says more
                absent = [str(r) for r in range(self.world_size) if not self._store.check([f"{key}/{r}"])]
                deadline.check(f"{waiting_for} (rank {', '.join(absent)} did not come)")
            cancel.check()
            time.sleep(pause)
            # However many ranks wait, the store is asked no more than so often.
            pause = min(2 * pause, _SHORTEST_PAUSE * self.world_size, _LONGEST_PAUSE)
        gathered = [self._store.get(f"{key}/{rank}") for rank in range(self.world_size)]
        if self.rank == 0:
            if not self._last:
                atexit.register(self.leave)
            self._last = f"{key}/seen"
        else:
            self._store.add(f"{key}/seen", 1)
        return gathered

    def leave(self) -> None:
        """Lets the others read what they came for: the store may live in this process, and go with it."""
        atexit.unregister(self.leave)
        last, self._last = self._last, ""
        patience = Deadline(_PATIENCE_SECONDS)
        with contextlib.suppress(RuntimeError):  # the store is gone already
            while last and self._store.add(last, 0) < self.world_size - 1 and not patience.expired:
                time.sleep(_SHORTEST_PAUSE)

    def post(self, key: str, text: bytes) -> None:
        """Puts something up unless it is there already; the first one wins."""
        self._store.compare_set(key, "", text.decode())

    def read(self, key: str) -> bytes | None:
        """What was posted, or None."""
        return self._store.get(key) if self._store.check([key]) else None

    def beat(self, count: int) -> None:
        """Shows that this rank is alive."""
        self._store.set(f"alive/{self.rank}", str(count))

    def beat_of(self, rank: int) -> bytes | None:
        """The last sign of life of a rank, or None if there never was one."""
        return self.read(f"alive/{rank}")

    def for_other_thread(self) -> Board:
        """The same board over a connection of its own, so that a long wait here does not block it."""
        clone: Callable[[], dist.Store] | None = getattr(self._store, "clone", None)  # torch 2.8 and newer
        return Board(clone() if clone else self._store, self.rank, self.world_size)
