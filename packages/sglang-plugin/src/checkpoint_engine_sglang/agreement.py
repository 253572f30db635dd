"""How the workers of one replica agree: every one of them learns what every other one says.

SGLang reports what its first rank says. Here the collective library that SGLang has connected its workers with (Gloo,
in host memory) carries a few bytes of each worker to all others, so that a failure anywhere is everybody's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec
import torch
import torch.distributed as dist

from checkpoint_engine.errors import WorkerError

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


class Workers(Protocol):
    """All workers of a replica."""

    def exchange(self, mine: _Message, seconds: float) -> list[_Message]:
        """What every worker brought, in order of rank. All of them must call it, in the same order."""
        ...

    def start(self, mine: _Message) -> Pending[_Message]:
        """Begins to exchange few bytes, and waits for nobody. All must call it, in the same order as `exchange`."""
        ...


class GroupOfWorkers:
    """Workers that are connected by one of torch's process groups."""

    def __init__(self, group: Any) -> None:  # noqa: ANN401 - torch does not export its type
        self._group = group
        self._size = int(dist.get_world_size(group))

    def exchange(self, mine: _Message, seconds: float) -> list[_Message]:
        """See `Workers`.

        Raises:
            WorkerError: a worker did not take part in time. What the others hold is unknown then.
        """
        if self._size == 1:
            return [mine]
        content = torch.frombuffer(bytearray(msgspec.msgpack.encode(mine)), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([content.numel()], dtype=torch.int64), seconds)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: content.numel()] = content
        everybody = self._gather(padded, seconds)
        return [
            msgspec.msgpack.decode(bytes(cast("Any", part[: int(size)]).tolist()), type=type(mine))
            for part, size in zip(everybody, sizes, strict=True)
        ]

    def start(self, mine: _Message) -> Pending[_Message]:
        """See `Workers`.

        Raises:
            WorkerError: it is too much.
        """
        content = msgspec.msgpack.encode(mine)
        if len(content) > _ROOM - _LENGTH:
            raise WorkerError(f"{len(content)} bytes are too many for a word between workers")
        words = len(content).to_bytes(_LENGTH, "little") + content
        packed = torch.frombuffer(bytearray(words.ljust(_ROOM, b"\0")), dtype=torch.uint8)
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


def _unpack(part: torch.Tensor, kind: type[_Message]) -> _Message:
    words = bytes(cast("Any", part).tolist())
    length = int.from_bytes(words[:_LENGTH], "little")
    return msgspec.msgpack.decode(words[_LENGTH : _LENGTH + length], type=kind)
