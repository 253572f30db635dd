"""What the ranks of an update tell each other before anything else, and what follows from it alike on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from checkpoint_engine.catalog import Holding
from checkpoint_engine.errors import RankError
from checkpoint_engine.link.messages import WORKER_NAME
from checkpoint_engine.transfer.exports import Export

__all__ = ["Introduction", "addresses_of", "agreed_generation", "decode_introductions"]


class Introduction(msgspec.Struct, frozen=True):
    """What a rank tells the others at the start of an update."""

    device: str
    handles: tuple[str, ...]
    """Where the workers that it feeds are to connect."""
    digest: str
    available: int = 0
    """Bytes of its device that staging may take."""
    generation: str = ""
    """Of the communicators among the receivers that it holds."""
    access: Holding | None = None
    """How this rank's host memory is read; None where nobody needs to."""
    export: Export | None = msgspec.field(name="offer", default=None)
    """What this rank exports to the workers of its host; None for a broadcast."""
    gate: Export | None = None
    """Where this rank counts the broadcasts that it is ready for; None if it receives none."""
    filling: Export | None = None
    """Where this rank marks how far it has filled what it exports; None if all of that is there."""
    refusal: str = ""
    """Why this rank cannot take part. It says so here because the others may not have begun yet."""

    def encode(self) -> bytes:
        """For the board."""
        return msgspec.msgpack.encode(self)


def decode_introductions(texts: Sequence[bytes], rank: int, checkpoint: str) -> list[Introduction]:
    """What all ranks say, in order of rank; `rank` is who reads it.

    Raises:
        RankError: a rank cannot take part, or knows the checkpoint differently.
    """
    ranks = [msgspec.msgpack.decode(text, type=Introduction) for text in texts]
    for number, other in enumerate(ranks):
        if other.refusal:
            raise RankError(f"rank {number} cannot take part: {other.refusal}")
        if other.digest != ranks[rank].digest:
            raise RankError(
                f"rank {number} and rank {rank} know {checkpoint!r} differently; call gather_metas on all ranks again"
            )
    return ranks


def addresses_of(ranks: Sequence[Introduction], *, by_number: bool) -> list[tuple[str, str]]:
    """What every worker is called, and where it is to connect; in the order of the workers.

    With `by_number` workers are numbered: a rank without a device cannot name a worker by it.
    """
    if by_number:
        handles = [handle for rank in ranks for handle in rank.handles]
        return [(f"{WORKER_NAME}{number}", handle) for number, handle in enumerate(handles)]
    return [(rank.device, handle) for rank in ranks for handle in rank.handles]


def agreed_generation(ranks: Sequence[Introduction], receivers: Sequence[int], new: str) -> str:
    """The communicators that all receivers still hold; `new` where they do not agree.

    A rank that failed in a call that others did not notice has closed its own; all make new ones then.
    """
    held = {ranks[rank].generation for rank in receivers}
    return held.pop() if len(held) == 1 and "" not in held else new
