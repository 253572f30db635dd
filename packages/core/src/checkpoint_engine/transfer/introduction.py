"""What the ranks of an update tell each other before anything else, and what follows from it alike on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from checkpoint_engine.catalog import Holding
from checkpoint_engine.errors import RankError
from checkpoint_engine.link.messages import WORKER_NAME
from checkpoint_engine.transfer.offers import Offer


class Introduction(msgspec.Struct, frozen=True):
    """What a rank tells the others at the start of an update."""

    device: str
    handles: tuple[str, ...]
    """Where the workers that it feeds are to connect."""
    available: int
    digest: str
    generation: str
    access: Holding | None
    """How this rank's host memory is read; None where nobody needs to."""
    offer: Offer | None = None
    """What this rank could lend to the workers of its host; None for a broadcast."""
    gate: Offer | None = None
    """Where this rank counts the broadcasts that it is ready for; None if it receives none."""
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


def addresses_of(ranks: Sequence[Introduction], *, by_place: bool) -> list[tuple[str, str]]:
    """What every worker is called, and where it is to connect; in the order of the workers.

    A rank without a device cannot name a worker by it, so there (`by_place`) workers are numbered.
    """
    if by_place:
        handles = [handle for rank in ranks for handle in rank.handles]
        return [(f"{WORKER_NAME}{place}", handle) for place, handle in enumerate(handles)]
    return [(rank.device, handle) for rank in ranks for handle in rank.handles]


def agreed_generation(ranks: Sequence[Introduction], receivers: Sequence[int], new: str) -> str:
    """The communicators that all receivers still hold; `new` where they do not agree.

    A rank that failed in a call that others did not notice has closed its own; all make new ones then.
    """
    held = {ranks[rank].generation for rank in receivers}
    return held.pop() if len(held) == 1 and "" not in held else new
