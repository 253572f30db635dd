"""One rank and its engine worker, for `update.py`. It runs on whichever `checkpoint_engine` is on the path.

Takes commands on standard input (`update [METHOD RELOAD]`, `trace FILE`, `verify`, `bucket-size BYTES`, `end`) and
answers each with one line of JSON.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import multiprocessing
from workloads import WORKLOADS, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from checkpoint_engine.server.parameter_server import ParameterServer

PERIOD = 251


def main() -> None:
    """Registers this rank's share of the workload, then follows commands."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print as they please; answers keep the pipe for themselves
    workload, device = sys.argv[1], sys.argv[2]
    from checkpoint_engine.ps import ParameterServer  # noqa: PLC0415 - the system under test

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    share_one_gpu(world, device)
    tensors = WORKLOADS[workload]()
    context = multiprocessing.get_context("spawn")
    orders, replies = context.Queue(), context.Queue()
    worker = context.Process(target=engine_worker, args=(rank, world, workload, device, orders, replies), daemon=True)
    worker.start()

    server = ParameterServer(auto_pg=True)
    share = named_tensors(tensors, rank, world)
    replies.get(timeout=300)
    begin = time.perf_counter()
    server.register_checkpoint("bench", named_tensors=share)
    registered = time.perf_counter()
    share.clear()
    if hasattr(server, "init_process_group"):
        server.init_process_group()
    connected = time.perf_counter()
    server.gather_metas("bench")
    gathered = time.perf_counter()
    print(
        json.dumps(
            {
                "register": registered - begin,
                "connect": connected - registered,
                "gather_metas": gathered - connected,
                "system": system_name(),
            }
        ),
        file=answer,
    )
    follow(server, rank, orders, replies, answer)
    worker.join(30)


def follow(server: ParameterServer, rank: int, orders: queue.Queue, replies: queue.Queue, answer: TextIO) -> None:
    """Does what standard input says, until it says `end`."""
    for line in sys.stdin:
        command = line.strip()
        if command == "end":
            orders.put(None)
            break
        if command == "verify":
            orders.put("verify")
            print(json.dumps({"wrong_bytes": replies.get(timeout=300)}), file=answer)
            continue
        if command.startswith("bucket-size"):
            # Another size for the same registered checkpoint; users set it once, by PS_MAX_BUCKET_SIZE_GB.
            server._settings = replace(server._settings, bucket_size=int(command.split()[1]))  # noqa: SLF001
            print(json.dumps({}), file=answer)
            continue
        server.store_based_barrier()
        words = command.split()
        options: dict[str, Any] = {"trace": True} if words[0] == "trace" else {}
        if words[0] == "update" and len(words) > 1:
            options = {"method": words[1], "reload": words[2]}
        begin = time.perf_counter()
        server.update("bench", lambda handles: orders.put(handles[rank][1]), **options)
        seconds = time.perf_counter() - begin
        if words[0] == "trace":
            save_traces(server, Path(command.partition(" ")[2]))
        report = getattr(server, "last_report", None)
        result = {"seconds": seconds, **replies.get(timeout=300)}
        if report is not None:
            result["stages"] = {stage: round(value, 4) for stage, value in report.seconds.items()}
            result["engine"] = getattr(report, "engine", {})
            result |= {"buckets": report.buckets, "staging": report.staging, "staging_kept": report.staging_kept}
        print(json.dumps(result), file=answer)


def named_tensors(tensors: list[Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's contiguous share, filled with a pattern that tells tensors apart."""
    share = -(-len(tensors) // world)
    mine = list(enumerate(tensors))[rank * share : (rank + 1) * share]

    def make(entry: tuple[int, Tensor]) -> tuple[str, torch.Tensor]:
        index, tensor = entry
        data = torch.empty(tensor.shape, dtype=torch.bfloat16)
        data.view(torch.uint8).fill_(index % PERIOD)
        return tensor.name, data

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(make, mine))


def engine_worker(rank: int, world: int, workload: str, device: str, orders: queue.Queue, replies: queue.Queue) -> None:
    """A stand-in for an engine: keeps its shards, loads tensor by tensor as engines do."""
    index = rank % torch.cuda.device_count() if device == "cuda" else rank
    place = torch.device(device, index) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(index)
    tensors = WORKLOADS[workload]()
    shards = {t.name: torch.zeros(t.shard_shape(world), dtype=torch.bfloat16, device=place) for t in tensors}
    dims = {t.name: t.dim for t in tensors}
    seconds = 0.0

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        nonlocal seconds
        begin = time.perf_counter()
        for name, weight in weights:
            shard, dim = shards[name], dims[name]
            source = weight if dim is None else weight.narrow(dim, rank * shard.shape[dim], shard.shape[dim])
            shard.copy_(source, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin

    receive = make_receiver(load, shards, dims, rank, index if device == "cuda" else None)
    replies.put("ready")
    while (order := orders.get()) is not None:
        if order == "verify":
            replies.put(sum(int((shards[t.name].view(torch.uint8) != i % PERIOD).sum()) for i, t in enumerate(tensors)))
            for shard in shards.values():
                shard.zero_()
            continue
        seconds = 0.0
        begin = time.perf_counter()
        receive(order)
        seconds = seconds or time.perf_counter() - begin
        used = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
        replies.put({"engine_seconds": seconds, "device_bytes_used": used[1] - used[0]})


def make_receiver(
    load: Callable[[list[tuple[str, torch.Tensor]]], None],
    shards: dict[str, torch.Tensor],
    dims: dict[str, int | None],
    rank: int,
    gpu: int | None,
) -> Callable[[str], object]:
    """What takes an update: ours with a reload plan if it is asked for, upstream's with its only function."""
    try:
        from checkpoint_engine.device import open_device  # noqa: PLC0415 - ours only
        from checkpoint_engine.receiver.reception import receive_update  # noqa: PLC0415
    except ImportError:
        from checkpoint_engine.worker import update_weights_from_ipc  # noqa: PLC0415 - the system under test

        context = make_zmq_context()
        return lambda order: update_weights_from_ipc(context, order, device_id=gpu or 0, run=load, post_hook=None)
    adapter = StandIn(load, shards, dims, rank)
    place = open_device("cpu", rank=rank) if gpu is None else open_device("cuda", index=gpu, rank=rank)
    return lambda order: receive_update(order, adapter, place)


class StandIn:
    """The adapter of the stand-in engine: its loader, or a plan of it."""

    def __init__(
        self,
        load: Callable[[list[tuple[str, torch.Tensor]]], None],
        shards: dict[str, torch.Tensor],
        dims: dict[str, int | None],
        rank: int,
    ) -> None:
        from checkpoint_engine.reload.reloader import Reloader  # noqa: PLC0415 - ours only

        shadow = {name: torch.empty_like(shard, device="meta") for name, shard in shards.items()}

        def load_shadow(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, weight in weights:
                shard, dim = shadow[name], dims[name]
                whole = weight if dim is None else weight.narrow(dim, rank * shard.shape[dim], shard.shape[dim])
                shard.copy_(whole)

        self._reloader = Reloader(load, shards, lambda: (load_shadow, shadow))

    def begin(self, update: Any) -> None:  # noqa: ANN401 - ours only, and this file runs without it
        """See `Adapter`."""
        self._reloader.begin(update.tensors, update.reload)

    def load(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """See `Adapter`."""
        self._reloader.load(tensors)

    def finish(self) -> Mapping[str, str | int | float]:
        """See `Adapter`."""
        return self._reloader.finish()

    def abort(self) -> bool:
        """See `Adapter`."""
        self._reloader.failed()
        return False


def save_traces(server: ParameterServer, path: Path) -> None:
    """Writes what all ranks did when."""
    from checkpoint_engine.transfer.trace import save_trace  # noqa: PLC0415 - ours only

    traces, report = server.gather_traces(), server.last_report
    if server.rank == 0:
        save_trace(path, traces, version=report.version, method=report.method, bytes=report.nbytes)


def share_one_gpu(world: int, device: str) -> None:
    """With fewer GPUs than ranks, NCCL cannot connect them; gloo can, slowly. Good for checking, not for timing."""
    if device == "cpu" or world <= torch.cuda.device_count():
        return
    from checkpoint_engine.collective import register_communicator  # noqa: PLC0415 - ours only
    from checkpoint_engine.collective.torch_group import open_gloo  # noqa: PLC0415

    register_communicator("nccl", open_gloo)


def make_zmq_context() -> object | None:
    """Upstream's worker needs one, ours does not."""
    try:
        import zmq  # noqa: PLC0415
    except ImportError:
        return None
    return zmq.Context()


def system_name() -> str:
    """Which implementation is on the path; the metadata of both may be."""
    name = "checkpoint-engine-core" if find_spec("checkpoint_engine.planning") else "checkpoint-engine"
    return f"{name} {version(name)}"


if __name__ == "__main__":
    main()
