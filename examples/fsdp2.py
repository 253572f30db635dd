"""A plain PyTorch loop with FSDP2 that publishes every step into a serving engine, in shards as they are.

    echo '{"extras": false, "dtype": "float32"}' > model.json
    python -m checkpoint_engine.reference.server --spec model.json --tensor-parallel-size 2 --port 8123 &
    torchrun --nproc-per-node 2 examples/fsdp2.py http://127.0.0.1:8123 --check /tmp/steps

It runs on the CPU, over gloo. The engine is the reference engine, with as many workers as there are ranks; with
vLLM or SGLang, take `VllmClient` or `SGLangClient` in place of `ReferenceClient`, and your model's parameters under the
names of its checkpoint. With `--check`, every step is gathered and saved after all, and the engine's parameters are
compared with it byte by byte.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.reference.model import ModelSpec, checkpoint_tensors

SPEC = ModelSpec(extras=False, dtype="float32")
TIMEOUT = 60.0


class Regression(torch.nn.Module):
    """The reference engine's tensors as parameters; what it learns is to make them small."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.names = {f"p{number}": name for number, (name, _) in enumerate(checkpoint_tensors(SPEC))}
        for key, (_, wanted) in zip(self.names, checkpoint_tensors(SPEC), strict=True):
            self.register_parameter(key, torch.nn.Parameter(torch.randn(wanted.shape, generator=generator)))

    def forward(self) -> torch.Tensor:
        """The loss."""
        return torch.stack([parameter.square().mean() for parameter in self.parameters()]).mean()


def asker(client: ReferenceClient, rank: int, version: str) -> Callable[[list[tuple[str, str]]], None]:
    """Asks the engine to take an update; one rank does."""

    def ask(handles: list[tuple[str, str]]) -> None:
        if rank == 0:
            client.update_weights(dict(handles), version=version, pause="none", reset_caches=False, timeout=TIMEOUT)

    return ask


def check(client: ReferenceClient, weights: dict[str, torch.Tensor], directory: Path, *, asking: bool) -> str:
    """Compares an engine with a cold start from all of the weights, which all ranks gather, and some ask for."""
    full = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in weights.items()}
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(SPEC.to_json())
        save_file({n: tensor.detach().contiguous() for n, tensor in full.items()}, directory / "model.safetensors")
    dist.barrier()
    if not asking:
        return ""
    found = client.collective_rpc("verify", Deadline(TIMEOUT), [str(directory)])
    return "as a cold start" if all(worker["ok"] for worker in found) else f"WRONG: {found}"


def main() -> None:
    """Trains and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="where it listens")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--check", type=Path, help="a directory for whole checkpoints to compare the engine with")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Regression()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    client = ReferenceClient(options.engine)
    with ParameterServer(device="cpu", master_port=0 if size == 1 else free_port()) as ps:
        for step in range(options.steps):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            optimizer.step()
            weights = {model.names[key]: parameter for key, parameter in model.state_dict().items()}
            ask = asker(client, rank, f"step-{step}")
            ps.publish(weights, ask, version=f"step-{step}", method=options.method, in_place=False)
            held = check(client, weights, options.check / str(step), asking=rank == 0) if options.check else ""
            if rank == 0:
                print(f"step {step}: loss {loss.item():.4f}, {held}", flush=True)
    dist.destroy_process_group()


def free_port() -> int:
    """A port of rank 0 that is not torchrun's own, alike on all ranks."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        mine = [probe.getsockname()[1]]
    dist.broadcast_object_list(mine)
    return int(mine[0])


if __name__ == "__main__":
    main()
