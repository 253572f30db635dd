"""A notice board: ranks exchange small messages on it, and learn that one of them failed or is lost."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.collective.parts import unpack_parts
from checkpoint_engine.collective.rank_messages import Call
from checkpoint_engine.collective.spoke import Spoke
from checkpoint_engine.contract.failure import Failure
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, RankError

__all__ = ["Board"]

_TICK_SECONDS = 0.05


class Board:
    """Exchanges bytes between ranks under keys that nobody else uses. No collective library is started for it."""

    def __init__(self, spoke: Spoke | None, members: Sequence[int], rank: int, *, everybody: bool) -> None:
        """A board for some ranks.

        Args:
            spoke: Connects this process with all ranks; None for a rank that is alone.
            members: Who takes part, by their ranks in the whole group.
            everybody: Whether those are all ranks there are.
            rank: Place of this process among them.
        """
        self.rank = rank
        self.world_size = len(members)
        self._members = tuple(members)
        self._named = () if everybody else self._members
        """As they are named to the hub, which need not read thousands of numbers from each of thousands."""
        self._spoke = spoke
        self._own_posts: dict[str, bytes] = {}

    def gather(
        self, key: str, mine: bytes, deadline: Deadline, cancel: Cancel, waiting_for: str, *, unless: str = ""
    ) -> list[bytes]:
        """Puts up `mine` and returns what all members put up under the same key, in order of rank.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
            RankError: a rank that had not come yet is lost; or something was posted under the key `unless`.
            CheckpointEngineError: the cause with which `cancel` was set meanwhile.
        """
        if self._spoke is None:
            cancel.check()
            return [mine]
        pending = self._spoke.ask(Call.GATHER, key, mine, members=self._named)
        try:
            while (answer := pending.wait(min(_TICK_SECONDS, deadline.remaining))) is None:
                problem = self._problem(key, deadline, cancel, waiting_for, unless)
                if problem is not None and (answer := pending.wait(0.0)) is None:  # rank 0 may leave once it was sent
                    raise problem
                if answer is not None:
                    break
        finally:
            self._spoke.give_up(pending)
        return unpack_parts(answer[0])

    def catch_up(self, deadline: Deadline, cancel: Cancel) -> None:
        """Returns once this rank knows all that was posted until now, and ranks that were lost had time to come back.

        Raises:
            DeadlineError: rank 0 did not answer in time.
            RankError: it is lost.
            SettingError: it cannot be reached as things are set.
            CheckpointEngineError: the cause with which `cancel` was set meanwhile.
        """
        if self._spoke is None:
            return
        self._spoke.wait_until_connected(deadline, cancel)
        pending = self._spoke.ask(Call.CHECK, "caught up")
        patience = Deadline(limits.RANK_RETURN)
        try:
            while pending.wait(min(_TICK_SECONDS, deadline.remaining)) is None:
                cancel.check()
                deadline.check("rank 0 answering")
                if 0 not in self._spoke.lost:
                    patience = Deadline(limits.RANK_RETURN)
                elif patience.expired:
                    raise RankError(f"rank 0 {self._spoke.lost[0]}", rank=0)
        finally:
            self._spoke.give_up(pending)
        while self.lost() is not None and not patience.expired and not deadline.expired:
            cancel.check()
            time.sleep(_TICK_SECONDS)

    def post(self, key: str, text: bytes) -> bytes:
        """Puts something up unless there is something; returns what counts, as far as others can be asked."""
        if self._spoke is None:
            return self._own_posts.setdefault(key, text)
        if not self._spoke.lost.get(0) and self._spoke.connected:
            answer = self._ask(Call.POST, key, text)
            if answer:
                self._spoke.posts[key] = answer[0]
        return self._spoke.posts.setdefault(key, text)

    def read(self, key: str) -> bytes | None:
        """What was posted, or None. Returns at once."""
        return (self._own_posts if self._spoke is None else self._spoke.posts).get(key)

    def lost(self) -> tuple[int, str] | None:
        """A member that is gone or does not live, and why one thinks so. Returns at once."""
        if self._spoke is None or not self._spoke.lost:
            return None
        known = dict(self._spoke.lost)
        others = (0, *self._members[: self.rank], *self._members[self.rank + 1 :])
        return next(((rank, known[rank]) for rank in others if rank in known), None)

    def _problem(
        self, key: str, deadline: Deadline, cancel: Cancel, waiting_for: str, unless: str
    ) -> CheckpointEngineError | None:
        """Why it is no use to wait on."""
        try:
            if self._spoke is not None:
                self._spoke.check(deadline)
            if deadline.expired:  # before `cancel`, which the end of the time may have set too: this says more
                deadline.check(f"{waiting_for} ({self._describe_absent(key)})")
            cancel.check()
        except CheckpointEngineError as error:
            return error
        if unless and (text := self.read(unless)) is not None:
            gave_up = msgspec.json.decode(text, type=Failure)
            return RankError(f"rank {gave_up.rank} gave up: {gave_up.message}", rank=gave_up.rank)
        lost = self.lost()
        if lost is not None and (lost[0] == 0 or lost[0] in self._absent(key)):
            return RankError(f"rank {lost[0]} {lost[1]}; it was waited for, for {waiting_for}", rank=lost[0])
        return None

    def _describe_absent(self, key: str) -> str:
        if self._spoke is not None and 0 in self._spoke.lost:
            return f"rank 0 {self._spoke.lost[0]}"
        absent = ", ".join(map(str, self._absent(key)))
        if not absent:
            return "rank 0 does not answer"
        return f"rank {absent} did not come; there are {self.world_size} ranks, as WORLD_SIZE says"

    def _absent(self, key: str) -> list[int]:
        answer = self._ask(Call.ABSENT, key)
        return msgspec.msgpack.decode(answer[0], type=list[int]) if answer else []

    def _ask(self, call: Call, key: str, *frames: bytes) -> list[bytes] | None:
        """The answer of rank 0, if it gives one soon."""
        if self._spoke is None:
            return None
        pending = self._spoke.ask(call, key, *frames, members=self._named)
        try:
            return pending.wait(limits.QUICK_ANSWER)
        finally:
            self._spoke.give_up(pending)
