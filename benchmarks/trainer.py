"""One rank of a trainer, and its stand-in engine's worker on the same device: new weights every step.

    python benchmarks/trainer.py SYSTEM[+SYSTEM…] WORKLOAD DEVICE STEPS

It runs on whichever `checkpoint_engine` is on the path, as rank `RANK` of `WORLD_SIZE`: each holds its share of the
whole tensors, or with `…-fsdp2` its rows of every one, as a DTensor; its worker keeps its part of each. Every step
changes every byte, brings the weights over, and has the worker compare all it holds with what it should. Prints one
line of JSON a step; `steps.py` starts the ranks.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rank import make_receiver, share_one_gpu, system_name
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from workloads import Tensor, share_of, tensors_of

PERIOD = 251
ANSWER_SECONDS = 300.0
FLAT_BYTES = 1 << 30
ALIGNMENT = 256
FSDP2 = "-fsdp2"
"""Ends the name of a system whose trainers hold rows of every tensor, as FSDP2 deals them out."""


class Pattern:
    """What the bytes of all tensors are after a step: neighbours differ in it, successive steps, and parts of one."""

    def __init__(self, tensors: Sequence[Tensor], place: torch.device) -> None:
        longest = max(tensor.nbytes for tensor in tensors)
        period = torch.arange(PERIOD, dtype=torch.uint8, device=place)
        self._bytes = period.repeat(longest // PERIOD + 2)

    def of(self, index: int, tensor: Tensor, step: int) -> torch.Tensor:
        """Bytes of a tensor, shaped like it: [..., last dimension in bytes]."""
        begin = (index * 7 + step * 13) % PERIOD
        return self._bytes[begin : begin + tensor.nbytes].view(*tensor.shape[:-1], -1)

    def part(self, index: int, tensor: Tensor, step: int, rank: int, world: int) -> torch.Tensor:
        """Bytes of what one of so many workers keeps."""
        whole = self.of(index, tensor, step)
        if tensor.dim is None:
            return whole
        size = whole.shape[tensor.dim] // world
        return whole.narrow(tensor.dim, rank * size, size)

    def rows(self, index: int, tensor: Tensor, step: int, rows: range) -> torch.Tensor:
        """Bytes of some of its rows."""
        whole = self.of(index, tensor, step)
        item = len(whole) // tensor.shape[0]  # the rows of a vector are its elements
        return whole[rows.start * item : rows.stop * item]


def place_of(rank: int, device: str) -> torch.device:
    """Where this rank's tensors lie."""
    if device == "cpu":
        return torch.device("cpu")
    place = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


def engine(
    rank: int, world: int, workload: str, device: str, orders: queue.Queue[Any], replies: queue.Queue[Any]
) -> None:
    """A stand-in for an engine's worker: its part of each tensor."""
    place = place_of(rank, device)
    tensors = tensors_of(workload)
    pattern = Pattern(tensors, place)
    held = {t.name: torch.zeros(t.shard_shape(world), dtype=getattr(torch, t.dtype), device=place) for t in tensors}
    dims = {t.name: t.dim for t in tensors}

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            shard, dim = held[name], dims[name]
            source = weight if dim is None else weight.narrow(dim, rank * shard.shape[dim], shard.shape[dim])
            shard.copy_(source, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()

    receive = make_receiver(load, held, dims, rank, place.index)
    replies.put(sum(tensor.nbytes for tensor in held.values()))
    while (order := orders.get()) is not None:
        if isinstance(order, int):
            replies.put(wrong_bytes(held, pattern, tensors, order, rank, world))
            continue
        begin = time.process_time()
        try:
            receive(order)
            failure = ""
        except Exception as error:  # noqa: BLE001 - the trainer shows it
            failure = f"{type(error).__name__}: {error}"
        replies.put((failure, time.process_time() - begin))


def wrong_bytes(
    held: Mapping[str, torch.Tensor], pattern: Pattern, tensors: Sequence[Tensor], step: int, rank: int, world: int
) -> int:
    """How many of a worker's bytes are not what they should be after a step."""
    differing = [
        (held[tensor.name].view(torch.uint8) != pattern.part(index, tensor, step, rank, world)).sum()
        for index, tensor in enumerate(tensors)
    ]
    return int(torch.stack(differing).sum())


@dataclass
class Trainer:
    """The weights that change, and what takes them over."""

    share: list[tuple[int, Tensor, range]]
    """Number of a tensor, what it is, and which rows of it this rank has."""
    weights: dict[str, torch.Tensor]
    """What it has."""
    given: dict[str, torch.Tensor]
    """The same as the system under test is given it: as it is, or as DTensors."""
    pattern: Pattern
    ask: Callable[[list[tuple[str, str]]], None]
    server: Any
    world: int
    meet: Callable[[int], None]
    """Waits for the trainers of all ranks, whatever the system under test has for that."""
    laps: dict[str, float] = field(default_factory=dict)
    """Seconds of the parts of a step."""

    def change(self, step: int) -> None:
        """Trains."""
        for index, tensor, rows in self.share:
            weight = self.weights[tensor.name].view(torch.uint8)
            weight.copy_(self.pattern.rows(index, tensor, step, rows))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def lap(self, name: str, work: Callable[[], object]) -> None:
        """Does one part of a step."""
        begin = time.perf_counter()
        work()
        self.laps[name] = time.perf_counter() - begin

    def publish(self, step: int, *, in_place: bool, method: str = "direct") -> None:
        """Ours, in one call: the weights stay where they are, or go through host memory while they are sent."""
        options = {"version": f"step-{step}", "method": method, "in_place": in_place}
        self.lap("update", lambda: self.server.publish(self.given, self.ask, **options))

    def host_memory(self, step: int, method: str) -> None:
        """Ours, call by call, as upstream's users do it."""
        self._by_calls(f"step-{step}", method=method)

    def upstream(self, step: int, *, peers: bool = False) -> None:
        """Upstream's way of the same; what it forgets in every update, its group of ranks, is timed apart."""
        del step
        self.lap("connect", self._connect)
        self._by_calls("step", **({"ranks": list(range(self.world))} if peers else {}))

    def _connect(self) -> None:
        if not torch.distributed.is_initialized():
            self.server.init_process_group()
        torch.distributed.barrier()

    def _by_calls(self, name: str, **options: Any) -> None:  # noqa: ANN401 - of the system under test
        pooled = {"named_tensors": self.given, "use_shared_memory_pool": True}
        self.lap("register", lambda: self.server.register_checkpoint(name, **pooled))
        self.lap("gather", lambda: self.server.gather_metas(name))
        self.lap("update", lambda: self.server.update(name, self.ask, **options))
        self.lap("unregister", lambda: self.server.unregister_checkpoint(name))

    def way(self, system: str) -> Callable[[int], None]:
        """How a step of a system goes."""
        return {
            "device": lambda step: self.publish(step, in_place=True),
            "host": lambda step: self.publish(step, in_place=False),
            "host-direct": lambda step: self.host_memory(step, "direct"),
            "host-broadcast": lambda step: self.host_memory(step, "broadcast"),
            "upstream": self.upstream,
            "upstream-p2p": lambda step: self.upstream(step, peers=True),
        }[system.removesuffix("-cpu").removesuffix(FSDP2)]


def main() -> None:
    """Runs the steps."""
    systems, workload, device, steps = sys.argv[1].split("+"), sys.argv[2], sys.argv[3], int(sys.argv[4])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print as they please; answers keep the pipe for themselves
    from checkpoint_engine.ps import ParameterServer  # noqa: PLC0415 - the system under test

    context = multiprocessing.get_context("spawn")
    orders, replies = context.Queue(), context.Queue()
    arguments = (rank, world, workload, device, orders, replies)
    worker = context.Process(target=engine, args=arguments, daemon=True)
    worker.start()
    place = place_of(rank, device)
    tensors = tensors_of(workload)
    sharded = systems[0].removesuffix("-cpu").endswith(FSDP2)
    share = rows_of(tensors, rank, world) if sharded else whole_of(share_of(tensors, rank, world))
    source = torch.device("cpu") if systems[0].endswith("-cpu") else place
    weights = flat_weights([replace(tensor, shape=(len(rows), *tensor.shape[1:])) for _, tensor, rows in share], source)
    pattern = Pattern([tensor for _, tensor, _ in share], source)
    given = distributed_tensors(share, weights, rank, world) if sharded else weights
    kept = replies.get(timeout=ANSWER_SECONDS)
    if not systems[0].startswith("upstream"):
        share_one_gpu(world, device)
    server = ParameterServer(auto_pg=True)
    bucket_sizes = watch_bucket_size(server)
    if world > 1 or systems[0].startswith("upstream"):
        server.init_process_group()
    trainer = Trainer(
        share,
        weights,
        given,
        pattern,
        lambda handles: orders.put(handles[rank][1]),
        server,
        world,
        meeting(rank, world),
    )
    number = 0
    for system in systems:
        for step in range(steps):
            row = {"system": system, "rank": rank, "step": step, "kept_bytes": kept}
            row |= one_step(trainer, system, number, orders, replies)
            row["bucket_bytes"] = bucket_sizes[-1]
            print(json.dumps(row), file=answer, flush=True)
            number += 1
    orders.put(None)
    worker.join(30)


def whole_of(share: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor, range]]:
    """All rows of these tensors."""
    return [(index, tensor, range(tensor.shape[0])) for index, tensor in share]


def rows_of(tensors: Sequence[Tensor], rank: int, world: int) -> list[tuple[int, Tensor, range]]:
    """A rank's rows of every tensor, as `torch.chunk` deals them out: the last ones may get fewer, or none."""
    steps = [-(-tensor.shape[0] // world) for tensor in tensors]
    return [
        (index, tensor, range(tensor.shape[0])[rank * step : (rank + 1) * step])
        for index, (tensor, step) in enumerate(zip(tensors, steps, strict=True))
    ]


def distributed_tensors(
    share: Sequence[tuple[int, Tensor, range]], weights: Mapping[str, torch.Tensor], rank: int, world: int
) -> dict[str, torch.Tensor]:
    """Rows as DTensors over a mesh of all ranks. Its group is gloo's, since NCCL connects no two ranks of one GPU."""
    address = f"tcp://{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 9}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    mesh = init_device_mesh(next(iter(weights.values())).device.type, (world,), backend_override={0: "gloo"})
    found: dict[str, torch.Tensor] = {}
    for _, tensor, _ in share:
        shape = torch.Size(tensor.shape)
        strides = torch.empty(shape, device="meta").stride()
        local = weights[tensor.name]
        found[tensor.name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=strides)
    return found


def flat_weights(tensors: Sequence[Tensor], place: torch.device) -> dict[str, torch.Tensor]:
    """All in few allocations, as trainers' flat buffers of parameters are; on the CPU in shared memory."""
    weights: dict[str, torch.Tensor] = {}
    waiting: list[Tensor] = []

    def allocate() -> None:
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in waiting]
        block = torch.empty(sum(sizes), dtype=torch.uint8, device=place)
        if place.type == "cpu":
            block.share_memory_()
        for tensor, part in zip(waiting, block.split(sizes), strict=True):
            weights[tensor.name] = part[: tensor.nbytes].view(getattr(torch, tensor.dtype)).view(tensor.shape)
        waiting.clear()

    for tensor in tensors:
        if waiting and sum(each.nbytes for each in waiting) + tensor.nbytes > FLAT_BYTES:
            allocate()
        waiting.append(tensor)
    if waiting:
        allocate()
    return weights


def meeting(rank: int, world: int) -> Callable[[int], None]:
    """Where all ranks wait for each other, before each step."""
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 7)
    store = torch.distributed.TCPStore(*place, world, rank == 0)

    def meet(number: int) -> None:
        if store.add(f"here-{number}", 1) == world:
            store.set(f"all-{number}", "here")
        store.wait([f"all-{number}"])

    return meet


def watch_bucket_size(server: Any) -> list[int]:  # noqa: ANN401 - of the system under test
    """Bytes of a bucket; ours says so beforehand, upstream finds out in every update."""
    if not hasattr(server, "_detect_bucket_size"):
        return [server._settings.bucket_size]  # noqa: SLF001 - one figure, for the table
    detect, found = server._detect_bucket_size, [0]  # noqa: SLF001

    def note(*arguments: Any, **options: Any) -> tuple[int, bool]:  # noqa: ANN401
        size, without = detect(*arguments, **options)
        found.append(size)
        return size, without

    server._detect_bucket_size = note  # noqa: SLF001
    return found


def one_step(
    trainer: Trainer, system: str, number: int, orders: queue.Queue[Any], replies: queue.Queue[Any]
) -> dict[str, Any]:
    """Changes all weights, brings them over, and has them compared."""
    trainer.change(number)
    trainer.laps.clear()
    trainer.meet(number)
    begin, worked = time.perf_counter(), time.process_time()
    trainer.way(system)(number)
    whole, worked = time.perf_counter() - begin, time.process_time() - worked
    failure, engine_worked = replies.get(timeout=ANSWER_SECONDS)
    orders.put(number)
    wrong = replies.get(timeout=ANSWER_SECONDS)
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    report = getattr(trainer.server, "last_report", None)
    return {
        "implementation": system_name(),
        "seconds": {**trainer.laps, "whole": whole},
        "cpu_seconds": worked + engine_worked,
        "stages": {} if report is None else {name: round(value, 4) for name, value in report.seconds.items()},
        "failure": failure,
        "wrong_bytes": wrong,
        "read_bytes": 0 if report is None else report.engine.get("read_bytes", 0),
        "device_bytes_used": total - free,
    }


if __name__ == "__main__":
    main()
