"""The engine's side under the names that existing users import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch

from checkpoint_engine.contract.figures import UpdateFigures
from checkpoint_engine.contract.sink import Update
from checkpoint_engine.device import Device, open_device
from checkpoint_engine.names import PLUGIN_OF, load_plugin_name
from checkpoint_engine.receiver.reception import receive_update

__all__ = ["FlattenedTensorMetadata", "update_weights_from_ipc"]


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
    """A sink made of two functions. It cannot take back what `run` has done."""

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

    def finish(self) -> UpdateFigures:
        if self._post_hook is not None:
            self._touched = True
            self._post_hook()
        return UpdateFigures()

    def abort(self) -> bool:
        return not self._touched


def _open(device_id: int | str) -> Device:
    if device_id == "cpu":
        return open_device("cpu")
    return open_device(index=int(device_id), rank=int(device_id))


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the plugin has under that name
    """Finds what a plugin brings under an old name; the plugin is imported only then.

    Raises:
        MissingDependencyError: the plugin is not installed.
    """
    if name not in PLUGIN_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load_plugin_name(name)
