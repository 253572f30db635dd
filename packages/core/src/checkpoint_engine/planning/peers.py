"""The plan of an update out of other hosts' memory: which receiver reads which bucket, and from whom it can.

Several parameter servers may hold the same checkpoint, each cut up in its own way: the first one's layout makes the
buckets, and every other one that holds the same tensors is another route for them. Pure: all ranks plan alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from checkpoint_engine.catalog import Catalog, Holding, TensorEntry
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.planning.buckets import Bucket, BucketPlan, plan_buckets
from checkpoint_engine.planning.copies import Copied, box_of_entry
from checkpoint_engine.planning.receivers import Port, ReadLoad, assign_receivers

__all__ = ["PeerPlan", "ReadPiece", "Route", "check_same", "plan_peer_reads", "port_of"]


class ReadPiece(msgspec.Struct, frozen=True):
    """Bytes `start` to `start + nbytes` of a holder's segment; they belong at `at` in the bucket."""

    holder: int
    segment: int
    start: int
    at: int
    nbytes: int


Route = tuple[ReadPiece, ...]
"""All pieces of one bucket, out of one parameter server."""


class PeerPlan(msgspec.Struct, frozen=True):
    """Buckets in the order in which they are sent; the owner of each is the index of its receiver among the receivers.

    `routes[i]` are the ways to read bucket i, the best one first; pieces refer to `holders`.
    """

    plan: BucketPlan
    holders: tuple[Holding, ...]
    routes: tuple[tuple[Route, ...], ...]


def plan_peer_reads(
    replicas: Sequence[Catalog], bucket_size: int, receivers: Sequence[Port], at_home: Mapping[int, int] | None = None
) -> PeerPlan:
    """Plans the reads.

    Args:
        replicas: Catalogs of one checkpoint; the more there are, the more senders work side by side.
        bucket_size: Bytes of a bucket; a tensor larger than that gets a bucket of its own.
        receivers: How each receiver is connected.
        at_home: Holders of the first catalog that are receivers themselves, by rank, and their places among them; they
            bring what they hold themselves.

    Raises:
        CheckpointStateError: the catalogs do not describe the same checkpoint.
    """
    check_same(replicas)
    holders = tuple(holding for catalog in replicas for holding in catalog.holdings)
    buckets = plan_buckets(replicas[0], bucket_size)
    finders = [_Finder(catalog, base) for catalog, base in _with_base(replicas)]
    holder_indices = {holding.rank: holder_index for holder_index, holding in enumerate(replicas[0].holdings)}
    routes = [_routes(bucket, holder_indices[bucket.owner], finders) for bucket in buckets.buckets]
    home = [(at_home or {}).get(bucket.owner) for bucket in buckets.buckets]
    remote = [index for index, receiver in enumerate(home) if receiver is None]
    loads = [
        ReadLoad(buckets.buckets[index].nbytes, tuple(_main_holder(route) for route in routes[index]))
        for index in remote
    ]
    chosen: list[Bucket] = []
    ways: list[tuple[Route, ...]] = []
    for index, receiver in enumerate(home):
        if receiver is not None:
            chosen.append(msgspec.structs.replace(buckets.buckets[index], owner=receiver))
            ways.append(tuple(routes[index]))
    for move in assign_receivers(loads, [port_of(holder) for holder in holders], receivers):
        index = remote[move.load]
        chosen.append(msgspec.structs.replace(buckets.buckets[index], owner=move.receiver))
        first = loads[move.load].owners.index(move.sender)
        ways.append((*routes[index][first:], *routes[index][:first]))
    return PeerPlan(BucketPlan(buckets.bucket_size, tuple(chosen)), holders, tuple(ways))


def check_same(replicas: Sequence[Catalog]) -> None:
    """Raises unless all catalogs describe the same checkpoint.

    Raises:
        CheckpointStateError: they do not, or there is none.
    """
    if not replicas or not any(True for _ in replicas[0].tensors()):
        raise CheckpointStateError("the metas name no tensor: nobody holds anything of this checkpoint")
    first = replicas[0]
    for other in replicas[1:]:
        difference = ""
        if other.fingerprint() != first.fingerprint():
            difference = "other tensors"
        elif first.content and other.content and other.content != first.content:
            difference = "other values in the same tensors"
        if difference:
            raise CheckpointStateError(
                f"the metas of {first.name!r} and {other.name!r} describe {difference}: only seeds of the same version "
                "can be read side by side; get the metas of all of them again"
            )


def port_of(holding: Holding) -> Port:
    """How a holder is connected; ranks of a host that use TCP share its way out."""
    cards = [card for card in holding.rdma_device.split(",") if card]
    host = (holding.p2p_address or holding.host).rpartition(":")[0] or holding.host
    return Port(f"{host}/{holding.rdma_device or 'tcp'}", float(max(1, len(cards))))


class _Finder:
    """Where a replica has which tensor."""

    def __init__(self, catalog: Catalog, base: int) -> None:
        self._where: dict[Copied, tuple[int, int, TensorEntry]] = {}
        self._sizes: dict[tuple[int, int], int] = {}
        for holder_index, holding in enumerate(catalog.holdings):
            for index, segment in enumerate(holding.segments):
                self._sizes[base + holder_index, index] = segment.nbytes
                for tensor in segment.tensors:
                    self._where[box_of_entry(tensor)] = base + holder_index, index, tensor

    def route(self, bucket: Bucket) -> Route:
        """As few pieces as this replica's layout allows."""
        pieces: list[ReadPiece] = []
        for tensor in bucket.tensors:
            box = box_of_entry(tensor)
            if box not in self._where or self._where[box][2].shape != tensor.shape:
                raise CheckpointStateError(
                    f"tensor {tensor.label!r} is in one catalog only; where parameter servers cut tensors "
                    "otherwise, give the metas of one of them"
                )
            holder, segment, found = self._where[box]
            at = tensor.offset - bucket.start
            _append(pieces, ReadPiece(holder, segment, found.offset, at, tensor.nbytes), self._sizes[holder, segment])
        return tuple(pieces)


def _append(pieces: list[ReadPiece], piece: ReadPiece, segment_nbytes: int) -> None:
    """Adds a piece, to the one before if both lie as far from each other there as here."""
    if not piece.nbytes:
        return
    if pieces:
        last = pieces[-1]
        end = piece.start + piece.nbytes
        alike = (last.holder, last.segment, last.start - last.at) == (
            piece.holder,
            piece.segment,
            piece.start - piece.at,
        )
        if alike and last.start <= piece.start and end <= segment_nbytes:
            pieces[-1] = msgspec.structs.replace(last, nbytes=end - last.start)
            return
    pieces.append(piece)


def _routes(bucket: Bucket, owner: int, finders: Sequence[_Finder]) -> list[Route]:
    own: Route = (ReadPiece(owner, bucket.segment, bucket.start, 0, bucket.nbytes),)
    return [own, *(finder.route(bucket) for finder in finders[1:])]


def _main_holder(route: Route) -> int:
    """Who sends most of it."""
    nbytes: dict[int, int] = {}
    for piece in route:
        nbytes[piece.holder] = nbytes.get(piece.holder, 0) + piece.nbytes
    return max(nbytes, key=lambda holder: (nbytes[holder], -holder), default=0)


def _with_base(replicas: Sequence[Catalog]) -> Iterator[tuple[Catalog, int]]:
    base = 0
    for catalog in replicas:
        yield catalog, base
        base += len(catalog.holdings)
