"""What every member of a gathering brought, as one frame: of thousands of ranks, a frame each would be millions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec

from checkpoint_engine.errors import RankError

__all__ = ["pack_parts", "unpack_parts"]

_WORTH_COMPRESSING = 1 << 16
_LARGEST = 1 << 32
"""Bytes; what unpacks to more is none of ours."""


class _Parts(msgspec.Struct, frozen=True, array_like=True):
    parts: bytes
    """A list in MessagePack."""
    compressed: bool


def pack_parts(parts: Sequence[bytes]) -> bytes:
    """One frame of all of them; what ranks say is much alike, so it shrinks well where it is large."""
    listed = msgspec.msgpack.encode(parts)
    worth = len(listed) > _WORTH_COMPRESSING
    return msgspec.msgpack.encode(_Parts(zlib.compress(listed, 1) if worth else listed, worth))


def unpack_parts(frame: bytes) -> list[bytes]:
    """What was packed, in the same order.

    Raises:
        RankError: that is no such frame.
    """
    try:
        packed = msgspec.msgpack.decode(frame, type=_Parts)
        listed = zlib.decompressobj().decompress(packed.parts, _LARGEST) if packed.compressed else packed.parts
        return msgspec.msgpack.decode(listed, type=list[bytes])
    except (msgspec.MsgspecError, zlib.error) as error:
        raise RankError(f"rank 0 answers with what is no gathering: {error}", rank=0) from error
