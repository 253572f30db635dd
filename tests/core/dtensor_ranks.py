"""A rank of a torch mesh, on the CPU: lays tensors out in all ways and says what is held of them, for a test to judge.

Usage: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment; writes safetensors and JSON to the given path.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from checkpoint_engine.errors import UnsupportedTensorError
from checkpoint_engine.source.given_before import GivenBefore
from checkpoint_engine.source.shards import NamedTensors, local_tensors

PLACEMENTS = ((Shard(0), Shard(0)), (Shard(1), Shard(0)), (Replicate(), Shard(1)), (Shard(0), Replicate()))
SHAPES = ((8, 6), (5, 3), (7, 9), (1, 4), (3, 1), (9, 2))


def whole(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5), torch.nn.LayerNorm(5))


def steps(mesh: DeviceMesh) -> dict[str, bool]:
    """What is given step by step, and whether what was remembered of the step before led to what is there."""
    given: dict[str, Any] = {
        "rows": distribute_tensor(whole(1, (8, 6)), mesh, [Shard(0)]),
        "little": distribute_tensor(whole(2, (1, 4)), mesh, [Shard(0)]),
        "all": distribute_tensor(whole(3, (3, 3)), mesh, [Replicate()]),
        "plain": torch.ones(2),
    }
    before = GivenBefore()

    def right(step: NamedTensors) -> bool:
        found, expected = before.local_tensors(step), local_tensors(step)
        if found.tensors.keys() != expected.tensors.keys() or found.shards != expected.shards:
            return False
        return all(found.tensors[label] is part for label, part in expected.tensors.items())

    seen = {"first": right(given), "the same": right(given), "in another dict": right(dict(given))}
    given["rows"].to_local().fill_(7)
    seen["other numbers"] = right(given)
    # What a rank has of them is of the same shape.
    seen["not cut"] = right({**given, "rows": distribute_tensor(whole(1, (4, 6)), mesh, [Replicate()])})
    seen["of another shape"] = right({**given, "rows": distribute_tensor(whole(1, (6, 8)), mesh, [Shard(0)])})
    seen["one less"] = right({name: value for name, value in given.items() if name != "all"})
    seen["other names"] = right({f"model.{name}": value for name, value in given.items()})
    tied = {**given, "again": given["rows"]}
    seen["under two names"] = right(tied)
    seen["under two names, the same"] = right(tied)
    seen["as at first"] = right(given)
    given["rows"]._local_tensor = torch.zeros(4, 6)  # as FSDP does when it moves its parameters
    seen["moved"] = right(given)
    seen["other objects"] = right({name: value.detach() for name, value in given.items()})  # as `state_dict` makes them
    return seen


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    held: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for number, shape in enumerate(SHAPES):
        for kind, placements in enumerate(PLACEMENTS):
            name = f"laid.{number}.{kind}"
            expected[name] = whole(number, shape)
            held[name] = distribute_tensor(expected[name], mesh, placements)
    parallel = model()
    expected |= {f"model.{name}": tensor.clone() for name, tensor in parallel.state_dict().items()}
    parallelize_module(parallel, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (*parallel, parallel):
        fully_shard(layer, mesh=mesh["data"])
    held |= {f"model.{name}": tensor for name, tensor in parallel.state_dict().items()}
    local = local_tensors(held)
    path = Path(sys.argv[1])
    save_file({label: tensor.contiguous().clone() for label, tensor in local.tensors.items()}, f"{path}.safetensors")
    places = {label: [name, place.whole, place.begin] for label, (name, place) in local.shards.items()}
    sums = distribute_tensor(torch.ones(4), mesh, (Replicate(), Replicate()))
    try:
        local_tensors({"sum": type(sums).from_local(torch.ones(4), mesh, (Partial(), Replicate()))})
        refusal = ""
    except UnsupportedTensorError as error:
        refusal = str(error)
    path.write_text(json.dumps({"places": places, "refusal": refusal, "steps": steps(mesh["tensor"])}))
    if os.environ["RANK"] == "0":
        save_file(expected, f"{path}.expected")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
