"""How the end of a gloo operation is waited for; the group is a stand-in: this is about a moment of microseconds."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint_engine.collective.torch_group import TorchGroup
from checkpoint_engine.errors import RankError

pytestmark = pytest.mark.pure


class Work:
    """Ends after some waits that were too short: just after the last of them was over."""

    def __init__(self, short_waits: int, failure: str = "") -> None:
        self.left = short_waits
        self.failure = failure

    def wait(self, timeout: timedelta | None = None) -> bool:
        if timeout is not None and self.left:
            self.left -= 1
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise RuntimeError(self.failure)
        return True

    def is_completed(self) -> bool:
        return not self.left


def group(work: Work) -> TorchGroup:
    known: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2, broadcast=lambda *_: work)
    return TorchGroup(known, "gloo")


@pytest.mark.parametrize("short_waits", [0, 1, 3])
def test_what_ends_just_after_a_wait_was_over_has_ended_well(short_waits: int) -> None:
    work = Work(short_waits)
    group(work).broadcast(torch.zeros(1), 1)
    assert not work.left


def test_what_fails_just_after_a_wait_was_over_says_why() -> None:
    with pytest.raises(RankError, match="gloo broadcast failed on rank 0: the peer is gone"):
        group(Work(2, "the peer is gone")).broadcast(torch.zeros(1), 1)


def test_who_gives_up_does_not_wait_for_it() -> None:
    given_up = group(Work(1_000_000))
    given_up.abort()
    with pytest.raises(RankError, match="given up"):
        given_up.broadcast(torch.zeros(1), 1)


def test_memory_that_is_freed_under_it_is_waited_for() -> None:
    """Of a GPU, for which `meta` stands here."""
    work = Work(2)
    given_up = group(work)
    given_up.abort()
    given_up.broadcast(torch.zeros(1, device="meta"), 1)
    assert work.left == 2
