"""Runs in vLLM's environment: a rank of a trainer that speaks vLLM's own interface, driven by lines of JSON.

Reads {"do": ..., ...} from stdin and answers each with a line on the descriptor given as the only argument.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any
from unittest import mock

import nccl_door
import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import clients
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from checkpoint_engine_vllm.transfer import backends
from checkpoint_engine_vllm.transfer.trainer import NativeTrainerInitInfo


class Trainer:
    """Methods are what `do` may ask for."""

    def __init__(self) -> None:
        self._native: Any = None
        self._nccl: Any = None
        self._tensors: dict[str, torch.Tensor] = {}

    def meet(self, endpoint: str, backend: str, rank: int = 0, **how: Any) -> None:
        """Makes a trainer of a backend; it was given nothing yet."""
        client = clients.HTTPVLLMWeightSyncClient(endpoint, timeout=120)
        if backend == "nccl":
            with nccl_door.without_a_gpu():
                self._nccl = nccl_door.Trainer(client, **how)
            return
        backends.register()
        info = NativeTrainerInitInfo(rank=rank, device="cpu", **how)
        self._native = WeightTransferTrainerFactory.trainer_init(
            info, client=client, source=nccl_door.Making(torch.nn.Module())
        )

    def send(self, checkpoint: str, *, in_place: bool = False, backend: str = "checkpoint_engine") -> None:
        """One step: `in_place` says that the trainer keeps these tensors in its own (shared) memory for good."""
        for name, tensor in read(checkpoint).items():
            self._tensors.setdefault(name, torch.empty_like(tensor).share_memory_()).copy_(tensor)
        if backend == "nccl":
            with nccl_door.without_a_gpu():
                self._nccl.send(self._tensors)
            return
        kind = ModuleSource if in_place else nccl_door.Making
        self._native._source = kind(nccl_door.module_of(self._tensors))
        self._native.send_weights(Path(checkpoint).name)

    def trl(self, endpoint: str, checkpoint: str, port: int) -> None:
        """TRL's own client, which knows nothing of us, updates an engine that runs the `nccl` receiver."""
        client_of = client_module_of_trl().VLLMClient
        with nccl_door.without_a_gpu(), mock.patch("torch.cuda.set_device"):
            client = client_of(endpoint, group_port=port, connection_timeout=10)
            client.init_communicator(device="cuda")
            client.update_model_params(nccl_door.module_of(read(checkpoint)))
            tensors = read(checkpoint)
            with client.weight_update():
                for name, tensor in tensors.items():
                    client.update_named_param(name, tensor)
            client.close_communicator()

    def part(self) -> None:
        """Ends both, and what they have sent."""
        if self._native is not None:
            self._native.shutdown()
        self._native = self._nccl = None
        self._tensors.clear()  # the next model has others


def client_module_of_trl() -> Any:
    """Without what its package imports beside (pandas, datasets)."""
    package: Any = types.ModuleType("trl.generation")
    package.__path__ = [str(Path(importlib.import_module("trl").__path__[0]) / "generation")]
    with mock.patch.dict(sys.modules, {package.__name__: package}):
        return importlib.import_module("trl.generation.vllm_client")


def read(checkpoint: str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(checkpoint).glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    faulthandler.enable()
    trainer = Trainer()
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any] = {"error": None}
            try:
                getattr(trainer, request.pop("do"))(**request)
            except Exception as error:  # noqa: BLE001 - reported to the test
                traceback.print_exc()
                answer = {"error": type(error).__name__, "message": str(error)}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
