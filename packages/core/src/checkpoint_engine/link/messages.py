"""What a parameter-server rank (the sender) and an engine worker (the receiver) say to each other.

One update, in order:

    receiver                     sender
    Hello              ->
                       <-        Begin           (with the descriptor of host staging, if any)
    Accepted           ->
                       <-        Load            one for each bucket, several may be under way
    Loaded             ->                        one for each Load, in the same order
                       <-        Finish          once every rank has loaded everything
    Released           ->                        only without a lease: staging is unmapped, and the engine goes on
    Finished           ->
    Failed             ->                        instead of any answer
                       <-        Abort           instead of any request
    Aborted            ->                        answers Abort

After Finished, a receiver that was given a lease keeps the staging memory mapped and the connection open, and the
sender may keep it open too. Neither says anything more: when one of them ends it, the receiver unmaps the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from checkpoint_engine.catalog import ShardPlace
from checkpoint_engine.contract.modes import WireMode
from checkpoint_engine.device.memory import Memory

__all__ = [
    "PROTOCOL",
    "WORKER_NAME",
    "Abort",
    "Aborted",
    "Accepted",
    "Begin",
    "Buckets",
    "Failed",
    "Finish",
    "Finished",
    "FromReceiver",
    "FromSender",
    "Hello",
    "Load",
    "Loaded",
    "Released",
    "TensorSlice",
    "Wanted",
    "decode_buckets",
    "encode_buckets",
    "name_of_layout",
]

PROTOCOL = 3
"""Raised whenever a message changes its meaning; both sides must state the same."""

WORKER_NAME = "worker:"
"""With its place among the engine's workers, names a worker whose device the sender does not know."""


class TensorSlice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor, or a shard of the shape that is told, `offset` bytes into its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    shard: ShardPlace | None = None


Buckets = tuple[tuple[TensorSlice, ...], ...]
"""The tensors of every bucket."""

_BUCKETS = msgspec.msgpack.Decoder(Buckets)


def encode_buckets(buckets: Iterable[Iterable[TensorSlice]]) -> msgspec.Raw:
    """As `Begin` carries them."""
    return msgspec.Raw(msgspec.msgpack.encode(tuple(tuple(bucket) for bucket in buckets)))


def decode_buckets(buckets: msgspec.Raw) -> Buckets:
    """What `encode_buckets` was given.

    Raises:
        msgspec.MsgspecError: it is something else.
    """
    return _BUCKETS.decode(buckets)


def name_of_layout(buckets: msgspec.Raw) -> str:
    """Names these very buckets."""
    return hashlib.sha256(buckets).hexdigest()[:32]


Wanted = tuple[tuple[int, int], ...] | None
"""Ranges (start, bytes) of a bucket that a receiver will read; None for all of it."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The receiver introduces itself."""

    protocol: int
    token: str
    device: str
    library: str
    torch: str
    pid: int
    layouts: tuple[str, ...] = ()
    """Names of buckets that it has been told of and need not be told again."""
    takes_parts: bool = False
    """Whether it knows what an update is that is `partial`."""
    holds: str | None = None
    """Names the update that brought what it last held whole (`name_of_update`); empty for those of its start, None if
    it does not tell."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Starts an update and says all that will come.

    `buckets` are `Buckets`, still encoded; empty if the receiver knows them by the name `layout`.
    """

    protocol: int
    library: str
    torch: str
    update_id: str
    checkpoint: str
    version: str
    staging: Memory
    buckets: msgspec.Raw
    reload: WireMode = "auto"
    """A receiver that does not know it refuses it."""
    layout: str = ""
    away: tuple[int, ...] = ()
    """Buckets that are to be fetched from other hosts: the receiver says what it wants of them."""
    checksums: bool = False
    """Whether the receiver takes checksums of all tensors, for `Finish`, and compares all copies that it makes."""
    partial: bool = False
    """Whether these tensors are a part of a checkpoint; only told to receivers that have said that they take such."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """Bucket `bucket` now lies `offset` bytes into the staging memory, or into the segment of that number."""

    bucket: int
    offset: int
    segment: int = 0
    again: bool = False
    """Whether this part of lent memory is used again as soon as the bucket is loaded, as staging always is."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Everything was sent, and every worker has loaded it."""

    sums: tuple[int, ...] = ()
    """Where they were asked for: checksums of all tensors where they were sent from, in the order of the buckets."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The update will not be completed."""

    reason: str


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """The receiver is ready for buckets; `wanted` is in the order of `Begin.away`."""

    wanted: tuple[Wanted, ...] = ()


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The bucket was taken; its memory may be used again.

    `seconds` is the time spent in the engine's loader, from `began` on the host's monotonic clock.
    """

    bucket: int
    seconds: float
    began: float = 0.0


class Released(msgspec.Struct, frozen=True, tag=True):
    """The receiver has unmapped the staging memory, and now completes the update; the sender may free it."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The engine holds exactly this version. `details` are its sink's figures; see `contract.figures`."""

    version: str
    seconds: float
    details: dict[str, str | int | float]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The receiver gave up. `dirty` says that its weights may be a mixture of old and new."""

    phase: str
    error: str
    message: str
    dirty: bool
    complete: bool = False
    """Whether it holds the update's weights all the same: what failed came after them."""
    traceback: str = ""
    """Where it failed, as Python prints it."""


class Aborted(msgspec.Struct, frozen=True, tag=True):
    """The receiver has followed an Abort."""

    dirty: bool


FromReceiver = Hello | Accepted | Loaded | Released | Finished | Failed | Aborted
FromSender = Begin | Load | Finish | Abort
