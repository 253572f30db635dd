"""Runs in vLLM's environment: vLLM's own `nccl` trainer where there is no GPU, so that gloo carries what NCCL would."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor
from vllm.distributed.weight_transfer.base import ModuleSource

if TYPE_CHECKING:
    from collections.abc import Iterator


class Gloo:
    """In the place of `PyNcclCommunicator`."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, *, leave_after: int | None) -> None:
        self._group: Any = stateless_init_torch_distributed_process_group(
            host, port, rank, world_size, "gloo", timeout=timedelta(seconds=60)
        )
        self.group = SimpleNamespace(store=None, socket=None)
        """What TRL clears at the end."""
        self._left = leave_after

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        del stream
        if self._left == 0:
            self._group = None
            raise RuntimeError("the trainer is gone")
        self._left = None if self._left is None else self._left - 1
        self._group.broadcast(tensor.view(-1).view(torch.uint8), src).wait()

    def destroy(self) -> None:
        self._group = None


class TorchOnTheCpu:
    """torch, as vLLM's modules see it: its streams are none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    cuda: Any = SimpleNamespace(
        current_stream=lambda: None,
        is_available=lambda: False,
        set_device=lambda _: None,
        stream=lambda _: contextlib.nullcontext(),
        Stream=lambda **_: SimpleNamespace(synchronize=lambda: None),
    )
    accelerator: Any = SimpleNamespace(current_device_index=lambda: 0)


@contextlib.contextmanager
def without_a_gpu(leave_after: int | None = None) -> Iterator[None]:
    """Has vLLM's trainer side, as it is, broadcast by gloo; the trainer is gone after so many broadcasts."""

    def join(host: str, port: int, rank: int, world_size: int, device: object) -> Gloo:
        del device
        return Gloo(host, port, rank, world_size, leave_after=leave_after)

    here = TorchOnTheCpu()
    packed_tensor._get_streams.cache_clear()
    with ExitStack() as patches:
        for part in (nccl_common, nccl_engine, packed_tensor):
            patches.enter_context(mock.patch.object(part, "torch", here))
        patches.enter_context(mock.patch.object(nccl_common, "stateless_init_process_group", join))
        yield


class Making(ModuleSource):
    """A source that makes each tensor anew, as one of sharded weights does."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.clone()) for name, tensor in super().__iter__())


def module_of(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with these parameters, which share their memory."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, own = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(own, torch.nn.Parameter(tensor, requires_grad=False))
    return root


class Trainer:
    """vLLM's own `nccl` trainer, as rank 0."""

    def __init__(self, client: Any, port: int, workers: int, *, buffer: int | None) -> None:
        packing = {"packed": False} if buffer is None else {"packed": True, "packed_buffer_size_bytes": buffer}
        self._trainer = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(
                rank=0, master_address="127.0.0.1", master_port=port, world_size=workers + 1, **packing
            ),
            client=client,
            source=Making(torch.nn.Module()),
        )

    def send(self, tensors: dict[str, torch.Tensor]) -> None:
        self._trainer.source = Making(module_of(tensors))
        self._trainer.send_weights()

    def close(self) -> None:
        self._trainer.shutdown()
