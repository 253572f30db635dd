"""What ranks say to the hub and what it says to them: MessagePack, and large answers beside it as they are."""

from __future__ import annotations

from enum import Enum

import msgspec

__all__ = [
    "NO_MESSAGE",
    "RANK_PROTOCOL",
    "Beat",
    "Bye",
    "Call",
    "FromHub",
    "FromSpoke",
    "Greet",
    "Lost",
    "Posted",
    "RankReply",
    "RankRequest",
    "Refused",
    "Returned",
    "Welcome",
]

RANK_PROTOCOL = 3

NO_MESSAGE = (msgspec.MsgspecError, ValueError, LookupError, RecursionError)
"""What reading and following a message may raise that is damaged, lacks frames, or names whom nobody knows."""


class Call(str, Enum):
    """What the hub can be asked for."""

    GATHER = "gather"
    """Takes one frame; the answer is those of all members, in one frame (see `parts`), once all have asked."""
    POST = "post"
    """Takes one frame, unless another was posted under this key; the answer is the one that counts."""
    ABSENT = "absent"
    """The answer is who has not asked for this gathering yet, as numbers in MessagePack."""
    SET = "set"
    """Takes a frame; the answer of this and the next ones is what the value is then."""
    GET = "get"
    """The answer comes once there is a value."""
    ADD = "add"
    SWAP = "swap"
    """Takes what is expected and what shall replace it; the answer is what is there then."""
    CHECK = "check"
    """The answer is a frame if there is a value."""
    DELETE = "delete"
    """The answer is a frame if there was a value."""


class RankRequest(msgspec.Struct, frozen=True, tag=True):
    """Asks for something. Sent again after a break of the connection; the hub does it once."""

    number: int
    """Of this rank's requests."""
    call: Call
    key: str
    members: tuple[int, ...] = ()
    """Of a gathering: the ranks that take part, in the order of the answer; empty if all do."""
    amount: int = 0
    frames: tuple[bytes, ...] = ()
    """What the call takes."""
    seen: tuple[int, ...] = ()
    """Requests whose replies have arrived: the hub may forget them."""


class RankReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a request. Small ones are in here: of thousands of ranks, each frame more is thousands."""

    number: int
    frames: tuple[bytes, ...] | None = None
    """None where they follow."""


class Greet(msgspec.Struct, frozen=True, tag=True):
    """What a rank says first, and again whenever its connection is a new one."""

    protocol: int
    rank: int
    world_size: int
    session: str
    """One process's stay: a rank that was started again has another."""
    process: int
    host: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The rank is taken for who it says it is; what was posted so far was sent before."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The rank does not belong here."""

    reason: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life, in both directions."""

    seen: tuple[int, ...] = ()
    """From a rank: as in a request."""
    answer: bool = False
    """From the hub: it is about to leave, and waits to hear what has been seen."""


class Bye(msgspec.Struct, frozen=True, tag=True):
    """Whoever says so leaves in good order, in both directions."""


class Posted(msgspec.Struct, frozen=True, tag=True):
    """Somebody has posted something; its frame follows."""

    key: str


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Ranks are gone, or do not live any more as far as can be seen: each, and why."""

    ranks: tuple[tuple[int, str], ...]


class Returned(msgspec.Struct, frozen=True, tag=True):
    """It is there again."""

    rank: int


FromSpoke = Greet | RankRequest | Beat | Bye
FromHub = Welcome | Refused | RankReply | Posted | Lost | Returned | Beat | Bye
