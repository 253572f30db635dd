"""A communicator in a group of its own, beside one that the caller has: upstream's `use_backend("vllm_nccl")`.

NCCL itself, which moves tensors of GPUs, is left out: two ranks of it need two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as torch_dist

import checkpoint_engine.distributed as dist
from checkpoint_engine.errors import SettingError
from tests.core.forked import Forked
from tests.ports import free_port

PATIENCE = timedelta(seconds=15)
CALLERS, RANKS = 3, 2
"""Of the processes in the caller's default group, the last ones are the ranks: 1 is rank 0 here, and 2 is rank 1."""


def caller(pipe: Connection, number: int, ports: list[int], backend: str | None) -> None:
    """A process with a default group of its own, in which it is another rank than in ours."""
    try:
        store = torch_dist.TCPStore("127.0.0.1", ports[0], CALLERS, number == 0, PATIENCE)
        torch_dist.init_process_group("gloo", store=store, rank=number, world_size=CALLERS, timeout=PATIENCE)
        group, pending = torch_dist.group.WORLD, torch.full((4,), number + 1.0)
        begun = torch_dist.all_reduce(pending, async_op=True) if number else None  # in flight all along: 0 waits
        first = number - (CALLERS - RANKS)
        heard = use_ours(first, ports[1:], backend) if first >= 0 else []
        pipe.send(heard)
        pipe.recv()  # all are through with ours
        if begun is None:
            torch_dist.all_reduce(pending)
        else:
            begun.wait()
        torch_dist.barrier()
        left_alone = torch_dist.group.WORLD is group and torch_dist.get_world_size() == CALLERS
        pipe.send((left_alone, torch_dist.get_rank(), pending.tolist()))
    except Exception as error:  # noqa: BLE001 - the test raises it
        pipe.send(error)


def use_ours(rank: int, ports: list[int], backend: str | None) -> list[object]:
    """What the ranks tell each other, by every collective; connected, left and connected again."""
    heard: list[object] = []
    dist.use_backend(backend)
    for port in ports:
        store = torch_dist.TCPStore("127.0.0.1", port, RANKS, rank == 0, PATIENCE)
        dist.init_process_group(rank=rank, world_size=RANKS, store=store, timeout=PATIENCE)
        everybody: list[object] = [None] * RANKS
        dist.all_gather_object(everybody, ("rank", rank))
        pair, alone = dist.new_group([0, 1]), dist.new_group([1])
        assert (pair is not None, alone is not None) == (True, rank == 1)
        dist.barrier(pair)
        heard += [everybody, tensors(rank)]
        dist.destroy_process_group(pair)
        dist.destroy_process_group()
        assert not dist.is_initialized()
        assert torch_dist.is_initialized()
    return heard


def tensors(rank: int) -> object:
    total, sent = torch.tensor([rank + 1.0]), torch.full((2,), rank)
    try:
        dist.all_reduce(total)
        dist.broadcast(sent, src=1)
    except SettingError as error:
        return str(error)
    return total.item(), sent.tolist()


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("backend", ["vllm_nccl", None])
def test_it_leaves_the_callers_group_alone(processes: ExitStack, backend: str | None) -> None:
    ports = [free_port() for _ in range(3)]
    callers = [processes.enter_context(Forked(caller, number, ports, backend)) for number in range(CALLERS)]
    heard = [process.hear() for process in callers]
    for process in callers:
        process.say("go on")
    assert [process.hear() for process in callers] == [(True, number, [6.0] * 4) for number in range(CALLERS)]

    idle, *ranks = heard
    assert idle == []
    for said in ranks:
        assert isinstance(said, list)
        assert said[::2] == [[("rank", 0), ("rank", 1)]] * 2
        if backend == "vllm_nccl":
            assert all("NCCL moves tensors of GPUs, not of cpu" in moved for moved in said[1::2])
        else:
            assert said[1::2] == [(3.0, [1, 1])] * 2
