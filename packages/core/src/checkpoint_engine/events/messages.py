"""Events as they travel: MessagePack with a type and a version, after a topic and a number that counts them."""

from __future__ import annotations

import struct

import msgspec

from checkpoint_engine.errors import SettingError

__all__ = [
    "EVENT_PROTOCOL",
    "TOPIC",
    "Event",
    "UpdateBegan",
    "UpdateEnded",
    "UpdateFailed",
    "decode_event",
    "pack_number",
    "replay_address",
    "unpack_number",
]

EVENT_PROTOCOL = 1
TOPIC = b"checkpoint-engine"
"""The first frame of every event."""
_NUMBER = struct.Struct(">q")
_LARGEST_PORT = 65535


class _UpdateEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    protocol: int = EVENT_PROTOCOL
    session: str
    """Of one publisher: a server that was started again has another, and counts from 0 anew."""
    time: float
    """Seconds since 1970, by the publisher's clock."""
    checkpoint: str
    version: str
    """What the engines call it, once they have it."""
    method: str
    ranks: int
    """How many ranks of the parameter server there are; rank 0 speaks for all."""


class UpdateBegan(_UpdateEvent, frozen=True, kw_only=True, tag=True):
    """Rank 0 was called, and meets the others."""


class UpdateEnded(_UpdateEvent, frozen=True, kw_only=True, tag=True):
    """Every worker of every engine holds the version."""

    nbytes: int
    tensors: int
    seconds: dict[str, float]
    """`total`, and stages as the report has them."""


class UpdateFailed(_UpdateEvent, frozen=True, kw_only=True, tag=True):
    """It did not complete."""

    error: str
    """Class of what failed first."""
    message: str
    phase: str
    rank: int | None
    """Who failed first; None where that is unknown."""
    held: str
    """Which weights the engine holds as far as rank 0 knows: `old`, `new`, `mixture` or `unknown`."""


Event = UpdateBegan | UpdateEnded | UpdateFailed

_DECODER: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def decode_event(payload: bytes) -> Event:
    """Reads the last frame of an event. Fields that a later version adds are left out.

    Raises:
        msgspec.MsgspecError: it is no event.
    """
    return _DECODER.decode(payload)


def pack_number(number: int) -> bytes:
    """The second frame: 8 bytes, big-endian and signed; -1 where a replay ends."""
    return _NUMBER.pack(number)


def unpack_number(frame: bytes) -> int:
    """What `pack_number` was given.

    Raises:
        ValueError: it is none.
    """
    if len(frame) != _NUMBER.size:
        raise ValueError(f"{len(frame)} bytes are no number")
    return int(_NUMBER.unpack(frame)[0])


def replay_address(address: str) -> str:
    """Where events are asked for again: at the next port, or at the path with `.replay` behind it.

    Raises:
        SettingError: it is no address of the form `tcp://HOST:PORT` or `ipc:///PATH`.
    """
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return f"{address}.replay"
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not (address.startswith("tcp://") and host and port.isdecimal() and 0 < int(port) < _LARGEST_PORT):
        raise SettingError(f"events go to tcp://HOST:PORT (and the next port) or ipc:///PATH, not to {address!r}")
    return f"tcp://{host}:{int(port) + 1}"
