"""Where a rank's own buckets come from before they are copied to its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from checkpoint_engine.transfer.trace import Span


class BucketSource(Protocol):
    """Gives the bytes of buckets, asked for in the order of the plan."""

    def ready(self, index: int) -> bool:
        """Whether `read` returns at once."""
        ...

    def read(self, index: int) -> torch.Tensor:
        """The bytes of a bucket in host memory, as 1-D uint8; waits for them.

        Raises:
            PeerError: they cannot be read.
            CheckpointEngineError: the cause with which the update was cancelled.
        """
        ...

    def release(self, index: int) -> None:
        """The bytes have been copied: their memory may be used for other buckets."""
        ...

    def spans(self) -> list[Span]:
        """When buckets were fetched from other hosts."""
        ...

    def close(self) -> None:
        """Stops fetching."""
        ...


class HostSource:
    """Buckets that lie in this rank's own host memory."""

    def __init__(self, find: Callable[[int], torch.Tensor]) -> None:
        self._find = find

    def ready(self, index: int) -> bool:
        """Always."""
        del index
        return True

    def read(self, index: int) -> torch.Tensor:
        """The bytes, where they are."""
        return self._find(index)

    def release(self, index: int) -> None:
        """They stay."""

    def spans(self) -> list[Span]:
        """Nothing is fetched."""
        return []

    def close(self) -> None:
        """Nothing to stop."""
