"""The control plane as torch's collective libraries want to see it: a store by which their groups find each other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from checkpoint_engine.collective.rank_messages import Call
from checkpoint_engine.collective.spoke import Spoke
from checkpoint_engine.deadline import Deadline

__all__ = ["RankStore"]

_TIMEOUT = timedelta(minutes=5)
_TICK_SECONDS = 0.1


class RankStore(dist.Store):
    """Whoever makes a group from it keeps it for as long as the group lives: torch's own code does not."""

    def __init__(self, spoke: Spoke) -> None:
        super().__init__()
        self._spoke = spoke
        self._timeout = _TIMEOUT
        self.home: tuple[str, int, str] = "", 0, ""
        """Host and port of rank 0, and name of the run."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Bounds every later wait."""
        self._timeout = timeout

    def set(self, key: str, value: bytes | str) -> None:
        """Writes a value."""
        self._ask(Call.SET, key, _bytes(value))

    def get(self, key: str) -> bytes:
        """Waits for a value, and returns it."""
        return self._ask(Call.GET, key)[0]

    def add(self, key: str, value: int) -> int:
        """Adds to a number, and returns it."""
        return int(self._ask(Call.ADD, key, amount=value)[0])

    def compare_set(self, key: str, expected_value: bytes | str, desired_value: bytes | str) -> bytes:
        """Replaces a value if it is the expected one; returns what is there then."""
        return self._ask(Call.SWAP, key, _bytes(expected_value), _bytes(desired_value))[0]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these have values."""
        return all(self._ask(Call.CHECK, key) for key in keys)

    def delete_key(self, key: str) -> bool:
        """Removes a value; returns whether there was one."""
        return bool(self._ask(Call.DELETE, key))

    deleteKey = delete_key  # noqa: N815 - by this name torch's own code finds it

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all of these have values."""
        for key in keys:
            self._ask(Call.GET, key, timeout=timeout)

    def _ask(
        self, call: Call, key: str, *frames: bytes, amount: int = 0, timeout: timedelta | None = None
    ) -> list[bytes]:
        deadline = Deadline((timeout or self._timeout).total_seconds())
        pending = self._spoke.ask(call, f"store/{key}", *frames, amount=amount)
        while (answer := pending.wait(min(_TICK_SECONDS, deadline.remaining))) is None:
            gone = self._spoke.lost.get(0)
            if gone or deadline.expired:
                self._spoke.give_up(pending)
                why = f"rank 0 {gone}" if gone else f"no answer came within {deadline.said}"
                raise dist.DistStoreError(f"connecting ranks by {key!r}: {why}")  # what torch's libraries expect
        return answer


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
