"""A stand-in, for tests only: the collectives of experts spread over replicas, which vLLM's build for the CPU lacks.

Named by `--worker-extension-cls`, which workers import before their model is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from faulty_extension import FaultyExtension
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Tensors of all replicas, one after the other."""
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, each, dim, sizes) for each in input_]
    pieces = [input_.new_empty((size, *input_.shape[1:])) for size in sizes or [input_.shape[0]] * self.world_size]
    for rank, piece in zip(self.ranks, pieces, strict=True):
        if rank == self.ranks[self.rank_in_group]:
            piece.copy_(input_)
        dist.broadcast(piece, rank, group=self.device_group)
    return torch.cat(pieces)


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None) -> torch.Tensor:
    """This replica's part of the sum of all."""
    summed = input_.clone()
    dist.all_reduce(summed, group=self.device_group)
    return summed.split(sizes or input_.shape[0] // self.world_size)[self.rank_in_group]


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv


class GatheringExtension(FaultyExtension):
    """Its module is what matters."""
