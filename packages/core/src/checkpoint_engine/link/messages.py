"""What a parameter-server rank (the sender) and an engine worker (the receiver) say to each other.

One update, in order:

    receiver                     sender
    Hello              ->
                       <-        Begin           (with the descriptor of host staging, if any)
    Accepted           ->
                       <-        Load            one for each bucket, several may be under way
    Loaded             ->                        one for each Load, in the same order
                       <-        Finish          once every rank has loaded everything
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
from typing import Literal

import msgspec

PROTOCOL = 1
"""Raised whenever a message changes its meaning; both sides must state the same."""

WORKER_NAME = "worker:"
"""With its place among the engine's workers, names a worker whose device the sender does not know."""

ReloadMode = Literal["auto", "plan", "loader", "verify"]
"""How tensors get from a bucket into the engine: by the reload plan as far as it reaches (`auto`), by nothing but the
plan (`plan`), or by the engine's own loader (`loader`). With `verify` they do not: the engine's weights are compared
with what they would become, and nothing changes. (A receiver that does not know it refuses it.)"""


class TensorSlice(msgspec.Struct, frozen=True, array_like=True):
    """A whole tensor, `offset` bytes into its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


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


class HostMemory(msgspec.Struct, frozen=True, tag=True):
    """Staging in host memory; its file descriptor comes with the message.

    `lease` names this very allocation if the receiver may keep it mapped after the update; else it is empty.
    """

    nbytes: int
    lease: str = ""


class CudaMemory(msgspec.Struct, frozen=True, tag=True):
    """Staging on the GPU that both sides share: a raw `cudaIpcMemHandle_t` of 64 bytes. `lease` as above."""

    nbytes: int
    handle: bytes
    lease: str = ""


class SharedSegments(msgspec.Struct, frozen=True, tag=True):
    """Host memory of the parameter server's ranks, from which the worker copies; a file descriptor for each.

    `lease` names these very segments if the receiver may keep them mapped after the update; else it is empty.
    """

    sizes: tuple[int, ...]
    lease: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes)


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
    staging: HostMemory | CudaMemory | SharedSegments
    buckets: msgspec.Raw
    reload: ReloadMode = "auto"
    layout: str = ""
    away: tuple[int, ...] = ()
    """Buckets that are to be fetched from other hosts: the receiver says what it wants of them."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """Bucket `bucket` now lies `offset` bytes into the staging memory, or into the segment of that number."""

    bucket: int
    offset: int
    segment: int = 0
    again: bool = False
    """Whether this part of lent memory is used again as soon as the bucket is loaded, as staging always is."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Everything was sent, and every worker has loaded it."""


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


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The engine holds exactly this version. `details` are the adapter's own figures, for people."""

    version: str
    seconds: float
    details: dict[str, str | int | float]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The receiver gave up. `dirty` says that its weights may be a mixture of old and new."""

    phase: str
    error: str
    message: str
    dirty: bool


class Aborted(msgspec.Struct, frozen=True, tag=True):
    """The receiver has followed an Abort."""

    dirty: bool


FromReceiver = Hello | Accepted | Loaded | Finished | Failed | Aborted
FromSender = Begin | Load | Finish | Abort
