"""A training loop that goes on when a replica dies, and whose last weights a new replica joins with, between two steps.

    echo '{"extras": false, "dtype": "float32"}' > model.json
    for port in 8123 8124; do python -m checkpoint_engine.reference.server --spec model.json --port $port & done
    CHECKPOINT_ENGINE_P2P=1 torchrun --nproc-per-node 2 examples/elastic_loop.py \
        http://127.0.0.1:8123 http://127.0.0.1:8124 --metas /tmp/metas.json

Kill an engine: the loop says so and goes on with the others. Start it anew, and

    checkpoint-engine join --metas /tmp/metas.json --engine reference --endpoint http://127.0.0.1:8124

brings it what the others serve, out of the trainer's host memory; from the next step on the loop feeds it again. Rank r
feeds replica r. It runs on the CPU with the reference engine, and needs Mooncake (`checkpoint-engine-core[p2p]`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from fsdp2 import Regression, check, free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpoint_engine import CheckpointEngineError
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.ps import ParameterServer

TIMEOUT = 60.0
NAME = "weights"


def living(client: ReferenceClient) -> list[int]:
    """Ranks whose replicas answer, alike on all ranks."""
    try:
        client.status(Deadline(2))
        here = True
    except CheckpointEngineError:
        here = False
    answers = [False] * dist.get_world_size()
    dist.all_gather_object(answers, here)
    return [rank for rank, answers_ in enumerate(answers) if answers_]


def asker(client: ReferenceClient, rank: int, version: str) -> Callable[[list[tuple[str, str]]], None]:
    """Has this rank's replica take the update."""

    def ask(handles: list[tuple[str, str]]) -> None:
        client.update_weights(dict([handles[rank]]), version=version, pause="none", reset_caches=False, timeout=TIMEOUT)

    return ask


def main() -> None:
    """Trains and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", help="where they listen, one for each rank")
    parser.add_argument("--metas", type=Path, required=True, help="where to say who holds the weights")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a step takes at least")
    parser.add_argument("--check", type=Path, help="a directory for whole checkpoints to compare the engines with")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Regression()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    client = ReferenceClient(options.engines[rank])
    with ParameterServer(device="cpu", master_port=free_port()) as ps:
        for step in range(options.steps):
            version = f"step-{step}"
            began = time.monotonic()
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
            weights = {model.names[key]: parameter for key, parameter in model.state_dict().items()}
            if step:
                ps.unregister_checkpoint(NAME)  # whoever is joining with the last step is told to read on
            ps.register_checkpoint(NAME, named_tensors=weights)
            ps.gather_metas(NAME)
            ready = living(client)
            while ready:
                try:
                    ps.update(NAME, asker(client, rank, version), ranks=ready, version=version)
                    break
                except CheckpointEngineError as error:  # who is alive is asked again, and so is updated again
                    if rank == 0:
                        print(f"{version}: {error}", flush=True)
                    ready = living(client)
            if rank == 0:
                new = options.metas.with_suffix(".new")
                ps.catalog(NAME).save(new)
                new.replace(options.metas)  # nobody reads half of it
            held = check(client, weights, options.check / str(step), asking=rank in ready) if options.check else ""
            print(f"{version}: replica {rank} {held or 'updated' if rank in ready else 'is gone'}", flush=True)
            time.sleep(max(0.0, began + options.seconds - time.monotonic()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
