"""What flows in an update, by method: from the plans that the product makes, in the order in which it sends them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.planning.buckets import Bucket, BucketPlan, plan_buckets
from checkpoint_engine.planning.peers import plan_peer_reads, port_of
from checkpoint_engine.planning.receivers import Port
from checkpoint_engine.planning.staging import choose_layout, place_buckets
from checkpoint_engine.transfer.direct import in_turn
from checkpoint_engine.transfer.fetching import READS_AHEAD
from simulation.fluid import Flow, Interval, simulate
from simulation.machines import Machine

__all__ = ["METHODS", "Step", "simulate_step"]

_STAGING = 16 << 30
"""Bytes of a GPU that staging may take; more than any layout asks for."""
_WATCHED = 16
"""So many ranks are followed one by one; of more, the first and the last."""
_FEW = 2
"""Buckets of an owner that never wait for room: its ring holds as many."""


@dataclass(frozen=True)
class Step:
    """How an update went."""

    seconds: float
    bound: float
    """What no order of the bytes can beat: of each wire, bytes over rate."""
    control: float
    buckets: int
    busy: float
    """Share of the time in which the bus of rank 0 carried something."""


class _Flows:
    def __init__(self) -> None:
        self.all: list[Flow] = []

    def add(self, flow: Flow) -> int:
        self.all.append(flow)
        return len(self.all) - 1


def simulate_step(
    machine: Machine, catalog: Catalog, method: str, *, parallel: int, bucket_size: int = 256 << 20
) -> Step:
    """Simulates one update.

    Args:
        machine: The hosts.
        catalog: What each rank holds; as many ranks as the machine has GPUs, or of other hosts for `join`.
        method: One of `METHODS`.
        parallel: Workers of an engine, each of which keeps that part of every tensor.
        bucket_size: Bytes.
    """
    flows = _Flows()
    start = flows.add(Flow("prelude", seconds=machine.prelude + machine.control))
    buckets = METHODS[method](flows, start, machine, catalog, parallel, bucket_size)
    wires = machine.wires()
    if method == "direct" and machine.ranks > _WATCHED:
        # Only the workers of one host are followed. Every other host reads as they do, and from others.
        wires |= {f"out{rank}": machine.card for rank in range(machine.ranks)}
    if method == "join":
        wires |= {f"seed{number}": machine.card for number in range(len(catalog.holdings))}
    intervals = simulate(wires, flows.all)
    end = max(interval.end for interval in intervals) + machine.ending
    carried: dict[str, float] = defaultdict(float)
    for flow in flows.all:
        for wire in flow.wires:
            carried[wire] += flow.nbytes
    bound = max(nbytes / wires[wire] for wire, nbytes in carried.items())
    return Step(end, bound, machine.control, buckets, _covered(flows.all, intervals, "bus0") / end)


def _broadcast(flows: _Flows, start: int, machine: Machine, catalog: Catalog, parallel: int, bucket_size: int) -> int:
    plan = plan_buckets(catalog, bucket_size)
    owners = [bucket.owner for bucket in plan.buckets]

    def source(_: int, bucket: Bucket, free: tuple[int, ...]) -> int:
        return flows.add(Flow("copy", bucket.nbytes, (f"bus{bucket.owner}",), (start, *free)))

    _pipeline(flows, start, machine, plan, owners, machine.ranks, parallel, source)
    return len(plan.buckets)


def _join(flows: _Flows, start: int, machine: Machine, catalog: Catalog, parallel: int, bucket_size: int) -> int:
    ports = [Port(f"card{rank}") for rank in range(machine.ranks)]
    reads = plan_peer_reads([catalog], bucket_size, ports)
    senders = [port_of(holding).nic for holding in reads.holders]
    fetched: dict[int, list[int]] = defaultdict(list)
    releases: dict[int, list[int]] = defaultdict(list)

    def source(index: int, bucket: Bucket, free: tuple[int, ...]) -> int:
        receiver = bucket.owner
        slot = releases[receiver][-READS_AHEAD] if len(releases[receiver]) >= READS_AHEAD else start
        pieces = [
            flows.add(
                Flow("fetch", piece.nbytes, (f"seed{_first(senders, piece.holder)}", f"in{receiver}"), (start, slot))
            )
            for piece in reads.routes[index][0]
        ]
        fetched[receiver] += pieces
        copy = flows.add(Flow("copy", bucket.nbytes, (f"bus{receiver}",), (*pieces, *free)))
        releases[receiver].append(copy)
        return copy

    owners = [bucket.owner for bucket in reads.plan.buckets]
    _pipeline(flows, start, machine, reads.plan, owners, machine.ranks, parallel, source)
    return len(reads.plan.buckets)


def _pipeline(
    flows: _Flows,
    start: int,
    machine: Machine,
    plan: BucketPlan,
    owners: Sequence[int],
    ranks: int,
    parallel: int,
    source: Callable[[int, Bucket, tuple[int, ...]], int],
) -> None:
    """Host to device, device to all devices, device to engine: as in `transfer/pipeline.py`."""
    watched = range(ranks) if ranks <= _WATCHED else (0, ranks - 1)
    layout = choose_layout(plan, ranks, _STAGING)
    if layout is None:
        raise ValueError("a bucket does not fit into staging")
    count = {owner: owners.count(owner) for owner in set(owners)} if ranks <= _WATCHED else {}
    rooms = {rank: place_buckets(plan, layout, rank) for rank in watched}
    last_copy: dict[int, int] = {}
    loads: dict[int, list[int]] = {rank: [] for rank in watched}
    fill = machine.hop * (machine.hosts - 1)
    sent = start
    for index, bucket in enumerate(plan.buckets):
        owner = owners[index]
        after = rooms[owner][index].after if owner in rooms and count.get(owner, _FEW + 1) > _FEW else None
        free = [] if after is None else [loads[owner][after]]
        copy = source(index, bucket, (*free, *([last_copy[owner]] if owner in last_copy else [])))
        last_copy[owner] = copy
        room = [
            loads[rank][each.after]
            for rank in watched
            if rank != owner and (each := rooms[rank][index]).after is not None
        ]
        here = copy
        if ranks > 1:
            sent = flows.add(Flow("broadcast", bucket.nbytes, ("broadcast",), (copy, sent, *room)))
            here = flows.add(Flow("arrives", after=(sent,), seconds=fill)) if fill else sent
        for rank in watched:
            kept = bucket.nbytes / parallel
            before = loads[rank][-1:]
            loads[rank].append(flows.add(Flow("load", kept, (f"memory{rank}",), (here, *before), machine.turn)))


def _direct(flows: _Flows, start: int, machine: Machine, catalog: Catalog, parallel: int, bucket_size: int) -> int:
    """What lies on a worker's host it takes from there; the rest a rank fetches, a few buckets ahead."""
    plan = plan_buckets(catalog, bucket_size)
    hosts = [str(rank // machine.gpus) for rank in range(machine.ranks)]
    for rank in range(machine.ranks if machine.ranks <= _WATCHED else machine.gpus):
        first = rank - rank % machine.gpus
        here = range(first, first + machine.gpus)
        local = start
        for bucket in plan.buckets:
            if bucket.owner in here:
                local = flows.add(
                    Flow("copy", bucket.nbytes / parallel, (f"bus{rank}",), (local,), machine.direct_turn)
                )
        remote: list[int] = []
        for index in in_turn(plan, rank, hosts):
            bucket = plan.buckets[index]
            slot = remote[-READS_AHEAD] if len(remote) >= READS_AHEAD else start
            wires = (f"in{rank}", f"out{bucket.owner}")
            fetch = flows.add(Flow("fetch", bucket.nbytes / parallel, wires, (slot,)))
            # The worker plays buckets one after the other.
            remote.append(
                flows.add(
                    Flow("copy", bucket.nbytes / parallel, (f"bus{rank}",), (fetch, *remote[-1:]), machine.direct_turn)
                )
            )
    return len(plan.buckets)


def _device(flows: _Flows, start: int, machine: Machine, catalog: Catalog, parallel: int, bucket_size: int) -> int:
    plan = plan_buckets(catalog, 4 * bucket_size)
    for rank in range(min(machine.ranks, _WATCHED)):
        done = start
        for bucket in plan.buckets:
            done = flows.add(Flow("copy", bucket.nbytes / parallel, (f"memory{rank}",), (done,)))
    return len(plan.buckets)


METHODS: dict[str, Callable[[_Flows, int, Machine, Catalog, int, int], int]] = {
    "broadcast": _broadcast,
    "direct": _direct,
    "join": _join,
    "device": _device,
}
"""Add to the flows what an update by each makes flow; return the number of buckets."""


def _first(senders: Sequence[str], holder: int) -> int:
    return senders.index(senders[holder])


def _covered(flows: Sequence[Flow], intervals: Sequence[Interval], wire: str) -> float:
    spans = sorted((i.begin, i.end) for flow, i in zip(flows, intervals, strict=True) if wire in flow.wires)
    total, reached = 0.0, 0.0
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
