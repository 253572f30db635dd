"""How the workers of one replica agree: every one of them learns what every other one says.

SGLang reports what its first rank says. Here the collective library that SGLang has connected its workers with (Gloo,
in host memory) carries a few bytes of each worker to all others, so that a failure anywhere is everybody's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import msgspec
import torch
import torch.distributed as dist

from checkpoint_engine.sdk import WorkerError

__all__ = ["Pending", "WorkerGroup"]

_Message = TypeVar("_Message", bound=msgspec.Struct)

_ROOM, _LENGTH = 1 << 14, 4
"""Bytes that each worker brings to an exchange that nobody waits for, and of the length in front of them."""


class Pending(Generic[_Message]):
    """An exchange under way."""

    def __init__(self, kind: type[_Message], work: Any, everybody: list[torch.Tensor]) -> None:  # noqa: ANN401
        self._kind = kind
        self._work = work
        self._everybody = everybody

    def is_over(self) -> bool:
        """Whether all have brought theirs, or the exchange has failed."""
        return bool(self._work.is_completed())

    def result(self) -> list[_Message]:
        """What every worker brought, in order of rank.

        Raises:
            WorkerError: the exchange failed.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise WorkerError(f"the workers of this engine cannot reach each other: {error}") from error
        return [_unpack(part, self._kind) for part in self._everybody]


class WorkerGroup:
    """All workers of a replica, connected by one of torch's process groups."""

    def __init__(self, group: Any) -> None:  # noqa: ANN401 - torch does not export its type
        self._group = group
        self._size = int(dist.get_world_size(group))

    def exchange(self, mine: _Message, seconds: float) -> list[_Message]:
        """What every worker brought, in order of rank. All of them must call it, in the same order.

        Raises:
            WorkerError: a worker did not take part in time. What the others hold is unknown then.
        """
        if self._size == 1:
            return [mine]
        content = msgspec.msgpack.encode(mine)
        sizes = self._gather(torch.tensor([len(content)], dtype=torch.int64), seconds)
        everybody = self._gather(_packed(content, _LENGTH + max(int(size) for size in sizes)), seconds)
        return [_unpack(part, type(mine)) for part in everybody]

    def start(self, mine: _Message) -> Pending[_Message]:
        """Begins to exchange few bytes, and waits for nobody. All must call it, in the same order as `exchange`.

        Raises:
            WorkerError: it is too much.
        """
        content = msgspec.msgpack.encode(mine)
        if len(content) > _ROOM - _LENGTH:
            raise WorkerError(f"{len(content)} bytes are too many for a word between workers")
        packed = _packed(content, _ROOM)
        everybody = [torch.empty_like(packed) for _ in range(self._size)]
        work = cast("Any", dist).all_gather(everybody, packed, group=self._group, async_op=True)
        return Pending(type(mine), work, everybody)

    def _gather(self, mine: torch.Tensor, seconds: float) -> list[torch.Tensor]:
        everybody = [torch.empty_like(mine) for _ in range(self._size)]
        try:
            work = cast("Any", dist).all_gather(everybody, mine, group=self._group, async_op=True)
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise WorkerError(f"not all workers of this engine answered within {seconds:g} s: {error}") from error
        return everybody


def _packed(content: bytes, room: int) -> torch.Tensor:
    words = len(content).to_bytes(_LENGTH, "little") + content
    return torch.frombuffer(bytearray(words.ljust(room, b"\0")), dtype=torch.uint8)


def _unpack(part: torch.Tensor, kind: type[_Message]) -> _Message:
    words = bytes(cast("Any", part).tolist())
    length = int.from_bytes(words[:_LENGTH], "little")
    return msgspec.msgpack.decode(words[_LENGTH : _LENGTH + length], type=kind)
