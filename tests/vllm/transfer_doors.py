"""Runs in vLLM's environment, for `engine_process.py`: updates through vLLM's own weight-transfer calls, offline."""

from __future__ import annotations

import contextlib
import json
import threading
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import nccl_door
import torch
from vllm.distributed.weight_transfer import clients, ipc_engine, packed_tensor

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine_vllm import LlmClient
from checkpoint_engine_vllm.extension import state_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def told() -> Iterator[dict[str, Any]]:
    """What became of it, as a test is told."""
    outcome: dict[str, Any] = {"error": None, "message": ""}
    try:
        yield outcome
    except Exception as error:  # noqa: BLE001 - reported to the test
        traceback.print_exc()
        outcome.update(error=type(error).__name__, message=str(error))


def status(worker: Any) -> dict[str, Any]:
    return state_of(worker).status()


class Served:
    """A parameter server in the engine's own process, whose client is vLLM's offline interface."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def update(self, name: str, tensors: dict[str, torch.Tensor], steps: str, **how: Any) -> None:
        """`steps`: which of vLLM's calls are made, by their first letters: init, start, update, finish."""
        with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
            ps.register_checkpoint(name, named_tensors=tensors)
            ps.gather_metas(name)
            ps.update(name, lambda handles: self._ask(dict(handles), name, steps), **how)

    def _ask(self, handles: dict[str, str], version: str, steps: str) -> None:
        if "i" in steps:
            self.llm.init_weight_transfer_engine({"init_info": {}})
        if "s" in steps:
            self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"handles": handles, "version": version}})
        if "f" in steps:
            self.llm.finish_weight_update(version)


def native(engine: Any, tensors: dict[str, torch.Tensor], checkpoint: str, steps: str, **how: Any) -> dict[str, Any]:
    """An update by the backend `checkpoint_engine`."""
    name = Path(checkpoint).name
    with told() as outcome:
        Served(engine.llm).update(name, tensors, steps, **how)
    return {**status(engine.worker), **outcome, "published": engine.llm.get_weight_version()}


def offline(engine: Any, tensors: dict[str, torch.Tensor], checkpoint: str, what: str, **how: Any) -> dict[str, Any]:
    """What a loop with an `LLM` of its own does after a step: `publish`; or a comparison, `verify`."""
    name, client = Path(checkpoint).name, LlmClient(engine.llm)

    def ask(handles: Any) -> None:
        client.update_weights(dict(handles), version=name, pause="keep", reset_caches=True, timeout=60)

    with told() as outcome, ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        if what == "publish":
            ps.publish(tensors, ask, version=name, **how)
        else:
            ps.register_checkpoint(name, named_tensors=tensors)
            ps.gather_metas(name)
            found = ps.verify(name, lambda handles: client.verify_weights(dict(handles), version=name, timeout=60))
            outcome["equal"] = found.equal
    paused = client.is_paused(Deadline(5))
    return {**status(engine.worker), **outcome, "published": engine.llm.get_weight_version(), "paused": paused}


# -- vLLM's own `ipc` trainer. There is no GPU here: handles name tensors of this process instead. ---------------------

TABLE: dict[bytes, torch.Tensor] = {}
GPU = "GPU-of-the-test"


def reduce_tensor(tensor: torch.Tensor) -> tuple[object, tuple[Any, ...]]:
    """As torch's own for a tensor on a GPU, by its fields."""
    key = b"key %d" % len(TABLE)
    TABLE[key] = tensor
    layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
    storage = type(tensor._typed_storage())
    shared = (key, tensor.untyped_storage().nbytes(), 0, False, b"/torch_1", 0, b"", False)
    return None, (type(tensor), *layout, storage, tensor.dtype, 0, *shared)


class SharedHere:
    """In the place of `SharedTensors`."""

    device = GPU

    def open(self, handle: Any) -> torch.Tensor:
        tensor = TABLE[handle.storage]
        return tensor.as_strided(handle.shape, handle.stride, handle.offset)

    def close(self) -> None:
        pass


class TorchOfThisTest:
    """torch, as vLLM's modules see it: its GPU is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *arguments: Any, device: str = "", **named: Any) -> torch.Tensor:
        del device
        return torch.empty(*arguments, **named)

    cuda: Any = SimpleNamespace(
        current_stream=lambda: SimpleNamespace(synchronize=lambda: None, wait_event=lambda _: None),
        get_device_properties=lambda _: SimpleNamespace(uuid=GPU),
        ipc_collect=lambda: None,
        is_available=lambda: False,
    )
    accelerator: Any = SimpleNamespace(current_device_index=lambda: 0)


class OneByOne:
    """vLLM's offline interface, as a server's engine does it: one call after the other.

    vLLM's `nccl` trainer leaves a call under way in a thread of its own when it fails.
    """

    turn = threading.Lock()

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            with self.turn:
                return getattr(self._llm, method)(*arguments)

        return call


class OfflineClient:
    """What a trainer speaks to: vLLM's offline interface, after the detour that its HTTP client takes."""

    def __init__(self, llm: Any, stop_after: int | None) -> None:
        self._llm = OneByOne(llm)
        self._left = stop_after
        self.calls = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self._left == self.calls:
            raise RuntimeError("the trainer is gone")
        self.calls += 1
        sent = json.loads(json.dumps(clients._json_safe_update_payload(update_info)))
        self._llm.update_weights({"update_info": sent})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def ipc(
    engine: Any, tensors: dict[str, torch.Tensor], *, buffer: int | None, stop_after: int | None = None
) -> dict[str, Any]:
    """An update by vLLM's own `ipc` trainer; `buffer`: bytes of its packed buffer, or not packed."""
    client, here = OfflineClient(engine.llm, stop_after), TorchOfThisTest()
    with told() as outcome, ExitStack() as patches:
        for part in (ipc_engine, packed_tensor):
            patches.enter_context(mock.patch.object(part, "torch", here))
            patches.enter_context(mock.patch.object(part, "reduce_tensor", reduce_tensor))
        engine.worker.weight_transfer_engine.shared = SharedHere()
        packing = {} if buffer is None else {"packed": True, "packed_buffer_size_bytes": buffer}
        trainer = ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(
            ipc_engine.IPCTrainerInitInfo(rank=0, **packing),
            client=client,
            source=nccl_door.Making(nccl_door.module_of(tensors)),
        )
        trainer.send_weights()
    TABLE.clear()
    return {**status(engine.worker), **outcome, "calls": client.calls}


TRAINERS: list[nccl_door.Trainer] = []
"""The `nccl` trainer that met the engine last."""


def nccl(
    engine: Any,
    tensors: dict[str, torch.Tensor],
    *,
    buffer: int | None,
    port: int | None,
    leave_after: int | None,
) -> dict[str, Any]:
    """An update by vLLM's own `nccl` trainer; a new one, if it is given a port to meet at."""
    with told() as outcome, nccl_door.without_a_gpu(leave_after):
        if port is not None:
            TRAINERS[:] = []
            TRAINERS.append(nccl_door.Trainer(OfflineClient(engine.llm, None), port, 1, buffer=buffer))
        TRAINERS[0].send(tensors)
    return {**status(engine.worker), **outcome}
