"""Where a rank's own buckets come from before they are copied to its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from checkpoint_engine.deadline import Cancel
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.planning.buckets import Bucket
from checkpoint_engine.source.store import Registered
from checkpoint_engine.transfer.trace import Span

__all__ = ["BucketSource", "HostSource", "find_bucket", "is_there"]

_TICK_SECONDS = 0.001


class BucketSource(Protocol):
    """Gives the bytes of buckets, asked for in the order of the plan."""

    def ready(self, index: int) -> bool:
        """Whether `read` returns at once."""
        ...

    def read(self, index: int) -> torch.Tensor:
        """The bytes of a bucket, as 1-D uint8; waits for them.

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
    """Buckets that lie in this rank's own memory."""

    def __init__(self, find: Callable[[int], torch.Tensor], is_there: Callable[[int], bool], cancel: Cancel) -> None:
        self._find, self._is_there, self._cancel = find, is_there, cancel
        self._read: dict[int, torch.Tensor] = {}
        """What is being copied: it may have been put together for that alone."""

    def ready(self, index: int) -> bool:
        """Whether all of it is there."""
        return self._is_there(index)

    def read(self, index: int) -> torch.Tensor:
        """The bytes, where they are."""
        while not self._is_there(index):
            self._cancel.check()
            self._cancel.wait(_TICK_SECONDS)
        self._read[index] = self._find(index)
        return self._read[index]

    def release(self, index: int) -> None:
        """Lets go of them."""
        self._read.pop(index, None)

    def spans(self) -> list[Span]:
        """Nothing is fetched."""
        return []

    def close(self) -> None:
        """Nothing to stop."""


def is_there(held: Registered | None, bucket: Bucket) -> bool:
    """Whether the bytes of a bucket of this rank's own have all come into its memory.

    Raises:
        CheckpointEngineError: they never will.
    """
    return held is None or held.refill is None or held.refill.has(bucket.segment, bucket.start + bucket.nbytes)


def find_bucket(held: Registered | None, bucket: Bucket, checkpoint: str) -> torch.Tensor:
    """The bytes of a bucket that lies in memory of this rank's own.

    Raises:
        CheckpointStateError: it holds nothing.
    """
    if held is None:
        raise CheckpointStateError(f"this rank holds nothing of {checkpoint!r}")
    return held.segments[bucket.segment].bytes_of(bucket)
