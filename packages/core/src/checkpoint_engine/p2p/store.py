"""Lets other hosts read this one's segments, and reads theirs; never a mixture of two versions.

A holder keeps a number in memory for every checkpoint that it shares, and clears it before the memory changes. A
reader reads the bytes first and the number afterwards: if it still is what the catalog says, the bytes were whole.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec

from checkpoint_engine import limits
from checkpoint_engine.errors import CheckpointStateError, HostMemoryError, PeerError, PeerMovedError
from checkpoint_engine.p2p.mooncake import MooncakeEngine
from checkpoint_engine.source.segment import ReadOnlyView, Segment

__all__ = ["MOST_RANGES", "ByteRange", "Lease", "P2PStore", "Peer"]

_MOST_BYTES = 64 << 20
MOST_RANGES = 128
"""Of one call of the engine: what is asked for in one call fails together, and a peer's queue is limited."""

_SLOT = struct.Struct("<Q")
_SLOTS = 512

_immortal: list[Segment] = []
"""Small pages in which late answers may still land; they stay as long as the process."""


class Peer(msgspec.Struct, frozen=True):
    """A process whose memory can be read, and what it must still hold when it has been read."""

    label: str
    address: str
    transport: str
    control_address: int
    generation: int


class ByteRange(msgspec.Struct, frozen=True):
    """`nbytes` at a peer's address `source`, for our own address `target`."""

    source: int
    target: int
    nbytes: int


class Lease(msgspec.Struct, frozen=True):
    """Where a shared checkpoint's generation stands in memory, and at which addresses its segments are read."""

    control_address: int
    generation: int
    segments: tuple[int, ...]


class P2PStore:
    """This process's end of the transfers. Safe for several threads."""

    def __init__(self, engine: MooncakeEngine, devices: Sequence[str], patience: float) -> None:
        """Takes over an engine.

        Args:
            engine: Started.
            devices: The RDMA devices that it uses.
            patience: Seconds after which a read without progress counts as failed, as the engine was told.
        """
        self._engine = engine
        self._patience = patience
        self._met: set[str] = set()
        """Addresses of peers that have shown that they live. The engine waits a minute for the first words of one that
        accepts a connection and says nothing, and talks to no other peer meanwhile."""
        self.nic = ",".join(devices)
        self._lock = threading.Lock()
        self._leases: dict[str, tuple[int, Lease]] = {}
        self._scratch = _page()
        _immortal.append(self._scratch)
        self.register(self._scratch)
        self._control = _page()
        self._control_address = self._publish(self._control)
        self._free_leases = list(range(_SLOTS))
        self._free_scratch: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(_SLOTS):
            self._free_scratch.put(slot)

    @property
    def address(self) -> str:
        """Where peers find the engine."""
        return self._engine.address

    @property
    def transport(self) -> str:
        """`rdma`, `efa` or `tcp`."""
        return self._engine.transport

    # -- what others read -------------------------------------------------------------------------------------------

    def share(self, name: str, segments: Sequence[Segment]) -> Lease:
        """Lets others read a checkpoint until `withdraw`; a second call changes nothing.

        Over TCP nobody can write: a mapping that the kernel keeps from being written is all that the engine knows.

        Raises:
            HostMemoryError: the network card cannot register it.
            CheckpointStateError: too many checkpoints are shared.
        """
        addresses = tuple(self._publish(segment) for segment in segments)
        with self._lock:
            if name not in self._leases:
                if not self._free_leases:
                    raise CheckpointStateError(f"{_SLOTS} checkpoints are shared already; unregister some")
                slot = self._free_leases.pop()
                generation = secrets.randbits(63) | 1
                _SLOT.pack_into(self._control.buffer(0, self._control.nbytes), slot * _SLOT.size, generation)
                control_address = self._control_address + slot * _SLOT.size
                self._leases[name] = slot, Lease(control_address, generation, addresses)
            return self._leases[name][1]

    def withdraw(self, name: str) -> None:
        """Makes every reader refuse what it reads of this checkpoint from now on; to be called before it changes."""
        with self._lock:
            if name in self._leases:
                slot, _ = self._leases.pop(name)
                _SLOT.pack_into(self._control.buffer(0, self._control.nbytes), slot * _SLOT.size, 0)
                self._free_leases.append(slot)

    # -- what we read -----------------------------------------------------------------------------------------------

    def register(self, segment: Segment) -> None:
        """Lets reads land in a segment; it is forgotten when it closes.

        Raises:
            HostMemoryError: the card cannot register it.
        """
        with self._lock:
            if segment.shared is None and segment.nbytes:
                self._engine.register(segment.address, segment.nbytes)
                segment.shared = _Registration(self._engine, segment.address)

    def read(self, peer: Peer, ranges: Sequence[ByteRange], check: Callable[[], None]) -> None:
        """Reads ranges of a peer's memory; returns once all have come and the peer still holds what it held.

        Args:
            peer: Whose memory.
            ranges: What to read, and where to; targets lie in registered segments.
            check: Called between parts of the work; what it raises ends the read.

        Raises:
            PeerMovedError: it holds other bytes by now.
            PeerError: it could not be read. Bytes may still land in the targets for as long as the patience lasts.
        """
        self._meet(peer)
        for batch in _batches(ranges):
            check()
            self._read_batch(peer, batch)
        check()
        self.verify(peer)

    def verify(self, peer: Peer) -> None:
        """Asks a peer whether it still holds what its catalog says.

        Raises:
            PeerMovedError: it does not.
            PeerError: it does not answer.
        """
        self._meet(peer)
        found = self._generation_of(peer)
        if found is None:
            raise PeerError(f"{peer.label} at {peer.address} cannot be read: {self._why_absent(peer) or self._idle}")
        if found != peer.generation:
            raise PeerMovedError(_moved(peer))

    def judge(self, peer: Peer) -> None:
        """As `verify`, after a read has failed: first whether it is there at all, for which the engine waits longer.

        Raises:
            PeerMovedError: it holds other bytes by now.
            PeerError: it is lost.
        """
        self._met.discard(peer.address)
        self.verify(peer)

    def retire(self, segment: Segment) -> None:
        """Frees a segment once no read that was given up can land in it any more."""
        segment.unpin()  # here, for another thread may have another GPU
        timer = threading.Timer(2 * self._patience, segment.close)
        timer.name, timer.daemon = "checkpoint-engine-retire", True
        timer.start()

    def close(self) -> None:
        """Withdraws everything. The engine itself ends with the process: reads may be under way."""
        for name in list(self._leases):
            self.withdraw(name)
        self._control.close()

    def _meet(self, peer: Peer) -> None:
        if peer.address in self._met:
            return
        if absent := self._why_absent(peer):
            raise PeerError(f"{peer.label} at {peer.address} cannot be read: {absent}")
        self._met.add(peer.address)

    def _read_batch(self, peer: Peer, batch: Sequence[ByteRange]) -> None:
        if self._engine.read(
            peer.address,
            [part.target for part in batch],
            [part.source for part in batch],
            [part.nbytes for part in batch],
        ):
            return
        absent = self._why_absent(peer)
        found = None if absent else self._generation_of(peer)
        if found is not None and found != peer.generation:
            raise PeerMovedError(_moved(peer))
        first, last = batch[0], batch[-1]
        raise PeerError(
            f"{peer.label} at {peer.address} could not be read at addresses {first.source:#x} to "
            f"{last.source + last.nbytes:#x} ({sum(part.nbytes for part in batch)} bytes): {absent or self._idle}"
        )

    def _generation_of(self, peer: Peer) -> int | None:
        """The number in the peer's memory; None if it cannot be read."""
        slot = self._free_scratch.get()
        offset = slot * _SLOT.size
        ok = self._engine.read(peer.address, [self._scratch.address + offset], [peer.control_address], [_SLOT.size])
        if not ok:
            return None  # the slot is not used again: an answer may still come
        (found,) = _SLOT.unpack_from(self._scratch.buffer(0, self._scratch.nbytes), offset)
        self._free_scratch.put(slot)
        return found

    def _why_absent(self, peer: Peer) -> str:
        """Why there is nobody to be read, found out over a plain connection; empty if there is somebody."""
        if peer.transport != self.transport:
            return f"it is reached over {peer.transport}, this process uses {self.transport}; both sides must agree"
        host, _, port = peer.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), limits.PEER_KNOCK) as knock:
                return self._why_mute(knock)
        except (ConnectionRefusedError, ConnectionResetError):  # the latter while it is ending
            return "nobody listens there: the process has ended, or the metas are old"
        except TimeoutError:
            return f"its host does not answer within {limits.PEER_KNOCK:g} s: is it up, is the port open?"
        except (OSError, ValueError) as error:
            return str(error)

    def _why_mute(self, knock: socket.socket) -> str:
        """A process that lives hangs up when we do; of one that is stopped, only its kernel answers."""
        patience = min(limits.CONNECT, self._patience)
        knock.shutdown(socket.SHUT_WR)
        knock.settimeout(patience)
        try:
            knock.recv(1)
        except TimeoutError:
            return f"it accepts connections and answers nothing within {patience:g} s: is its process stopped?"
        except ConnectionError:  # that is an answer, too
            pass
        return ""

    @property
    def _idle(self) -> str:
        return (
            "it listens, but does not hand these bytes over: it shares them no longer, or made no progress within "
            f"{self._patience:g} s"
        )

    def _publish(self, segment: Segment) -> int:
        """Lets others read a segment; returns the address at which they do."""
        with self._lock:
            shared = segment.shared
            if not segment.nbytes:
                return 0
            if self.transport != "tcp" or isinstance(shared, _Publication):
                address = shared.address if isinstance(shared, _Publication) else segment.address
                if shared is None:
                    self._engine.register(address, segment.nbytes)
                    segment.shared = _Registration(self._engine, address)
                return address
            if shared is not None:
                shared.close()
            segment.shared = None
            view = ReadOnlyView(segment)
            try:
                self._engine.register(view.address, segment.nbytes)
            except HostMemoryError:
                view.close()
                raise
            segment.shared = _Publication(self._engine, view)
            return view.address


class _Registration:
    """A segment's registration with the engine."""

    def __init__(self, engine: MooncakeEngine, address: int) -> None:
        self._engine = engine
        self.address = address

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # an engine that goes away forgets it by itself
            self._engine.unregister(self.address)


class _Publication(_Registration):
    """The registration of a mapping that cannot be written through."""

    def __init__(self, engine: MooncakeEngine, view: ReadOnlyView) -> None:
        super().__init__(engine, view.address)
        self._view = view

    def close(self) -> None:
        super().close()
        self._view.close()


def _page() -> Segment:
    page = Segment.create(_SLOTS * _SLOT.size)
    page.touch(0, page.nbytes)
    return page


def _batches(ranges: Sequence[ByteRange]) -> Iterator[list[ByteRange]]:
    batch: list[ByteRange] = []
    nbytes = 0
    for part in _cut(ranges):
        if batch and (nbytes + part.nbytes > _MOST_BYTES or len(batch) == MOST_RANGES):
            yield batch
            batch, nbytes = [], 0
        batch.append(part)
        nbytes += part.nbytes
    if batch:
        yield batch


def _cut(ranges: Sequence[ByteRange]) -> Iterator[ByteRange]:
    for whole in ranges:
        for start in range(0, whole.nbytes, _MOST_BYTES):
            nbytes = min(_MOST_BYTES, whole.nbytes - start)
            yield ByteRange(whole.source + start, whole.target + start, nbytes)


def _moved(peer: Peer) -> str:
    return (
        f"{peer.label} at {peer.address} no longer holds what its metas say: it has unregistered that checkpoint, "
        "moved on to another version or started anew; get its metas again"
    )
