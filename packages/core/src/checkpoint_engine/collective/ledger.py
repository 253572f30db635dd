"""What the ranks share: what they gather and post, and a few values for libraries that connect ranks by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from checkpoint_engine.collective.parts import pack_parts
from checkpoint_engine.collective.rank_messages import Call, RankRequest

__all__ = ["Due", "Ledger"]


class Due(NamedTuple):
    """An answer that can be given now."""

    rank: int
    number: int
    frames: list[bytes]


class _Gathering:
    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.brought: dict[int, bytes] = {}
        self.waiting: list[tuple[int, int]] = []
        self._among = frozenset(members)

    @property
    def complete(self) -> bool:
        return len(self.brought) >= len(self.members) and self.brought.keys() >= self._among


class Ledger:
    """Kept by one process for all ranks; not for several threads at once."""

    def __init__(self, world_size: int) -> None:
        self._all = tuple(range(world_size))
        self.posts: dict[str, bytes] = {}
        self._gatherings: dict[str, _Gathering] = {}
        self._values: dict[str, bytes] = {}
        self._readers: dict[str, list[tuple[int, int]]] = {}

    def take(self, rank: int, request: RankRequest, frames: Sequence[bytes]) -> list[Due]:
        """Does what a rank asks for; returns the answers that can be given now, to this rank and to others."""
        if request.call is Call.GATHER:
            return self._gather(rank, request, frames[0])
        if request.call is Call.GET and request.key not in self._values:
            self._readers.setdefault(request.key, []).append((rank, request.number))
            return []
        due = [Due(rank, request.number, self._answer(request, frames))]
        if request.key in self._values:
            readers = self._readers.pop(request.key, [])
            due += [Due(reader, number, [self._values[request.key]]) for reader, number in readers]
        return due

    def _answer(self, request: RankRequest, frames: Sequence[bytes]) -> list[bytes]:
        match request.call:
            case Call.POST:
                return [self._post(request.key, frames[0])]
            case Call.ABSENT:
                return [msgspec.msgpack.encode(self._absent(request.key, request.members))]
            case Call.DELETE:
                return [b""] if self._values.pop(request.key, None) is not None else []
            case Call.CHECK:
                return [b""] if request.key in self._values else []
            case _:
                return [self._change(request, frames)]

    def _change(self, request: RankRequest, frames: Sequence[bytes]) -> bytes:
        """Changes a value as asked; returns what it is then."""
        value = self._values.get(request.key)
        if request.call is Call.SET:
            value = frames[0]
        elif request.call is Call.ADD:
            value = str(int(value or b"0") + request.amount).encode()
        elif request.call is Call.SWAP:
            expected, desired = frames
            if value is None and expected:
                return expected
            value = desired if (value or b"") == expected else value
        if value is not None:
            self._values[request.key] = value
        return value or b""

    def _gather(self, rank: int, request: RankRequest, mine: bytes) -> list[Due]:
        gathering = self._gatherings.setdefault(request.key, _Gathering(request.members or self._all))
        gathering.brought[rank] = mine
        gathering.waiting.append((rank, request.number))
        if not gathering.complete:
            return []
        del self._gatherings[request.key]
        everything = pack_parts([gathering.brought[member] for member in gathering.members])
        return [Due(member, number, [everything]) for member, number in gathering.waiting]

    def _absent(self, key: str, members: tuple[int, ...]) -> list[int]:
        gathering = self._gatherings.get(key)
        return [member for member in members or self._all if gathering is None or member not in gathering.brought]

    def _post(self, key: str, text: bytes) -> bytes:
        if key not in self.posts:
            self.posts[key] = text
            # What is posted ends the call to which it belongs: nobody comes to its gatherings any more.
            call = key.rpartition("/")[0] + "/"
            for abandoned in [other for other in self._gatherings if other.startswith(call)]:
                del self._gatherings[abandoned]
        return self.posts[key]
