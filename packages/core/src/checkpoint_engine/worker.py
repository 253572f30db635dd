"""The engine's side under the names that existing users import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch

from checkpoint_engine.device import Device, open_device
from checkpoint_engine.engine.adapter import Update
from checkpoint_engine.engine.receiver import receive_update
from checkpoint_engine.errors import MissingDependencyError

if TYPE_CHECKING:
    from checkpoint_engine_vllm import WorkerExtension as VllmColocateWorkerExtension

__all__ = ["FlattenedTensorMetadata", "VllmColocateWorkerExtension", "update_weights_from_ipc"]


class FlattenedTensorMetadata(TypedDict):
    """A tensor in a flat buffer, `offset` bytes from its beginning."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int


def update_weights_from_ipc(
    zmq_ctx: object,
    zmq_handle: str,
    device_id: int | str,
    *,
    run: Callable[[list[tuple[str, torch.Tensor]]], None],
    post_hook: Callable[[], None] | None = None,
) -> None:
    """Takes one update from a parameter-server rank of this host.

    Args:
        zmq_ctx: Ignored: the link is a Unix socket of its own kind. Pass None.
        zmq_handle: The handle that `req_func` got for this worker's device.
        device_id: Index of the worker's CUDA device in this process; on a host without CUDA, its rank or "cpu".
        run: Called for each bucket with `[(name, tensor), …]`. The memory is used again once it returns: what is
            needed for longer must be copied.
        post_hook: Called once, after the last bucket.

    Raises:
        LinkError: the parameter server cannot be reached, or is gone.
        DeadlineError: it fell silent.
        WorkerError: the update was aborted from the other side.
        Exception: whatever `run` or `post_hook` raises, after the parameter server was told.
    """
    del zmq_ctx
    receive_update(zmq_handle, _Callbacks(run, post_hook), _open(device_id))


class _Callbacks:
    """An adapter made of two functions. It cannot take back what `run` has done."""

    def __init__(
        self,
        run: Callable[[list[tuple[str, torch.Tensor]]], None],
        post_hook: Callable[[], None] | None,
    ) -> None:
        self._run = run
        self._post_hook = post_hook
        self._touched = False

    def begin(self, update: Update) -> None:
        del update

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._touched = True
        self._run(list(tensors))

    def finish(self) -> Mapping[str, str | int | float]:
        if self._post_hook is not None:
            self._touched = True
            self._post_hook()
        return {}

    def abort(self) -> bool:
        return not self._touched


def _open(device_id: int | str) -> Device:
    if device_id == "cpu" or not torch.cuda.is_available():
        return open_device("cpu", rank=int(device_id) if device_id != "cpu" else 0)
    return open_device("cuda", index=int(device_id))


def __getattr__(name: str) -> object:
    """Finds what the vLLM plugin serves under the old name; the plugin is imported only then.

    Raises:
        MissingDependencyError: the plugin is not installed.
    """
    if name != "VllmColocateWorkerExtension":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from checkpoint_engine_vllm import WorkerExtension  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "checkpoint_engine_vllm":
            raise
        raise MissingDependencyError(
            f"{name} comes with the vLLM plugin; install it where vLLM is: pip install checkpoint-engine-vllm"
        ) from None
    return WorkerExtension
