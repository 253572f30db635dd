"""The backend `checkpoint_engine_ipc`: takes what vLLM's own `ipc` trainers send, packed or not, by reload plan.

Over HTTP too, without VLLM_ALLOW_INSECURE_SERIALIZATION: the pickled handles are read by a reader that runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.transfer.handles import read_handle, read_pickled
from checkpoint_engine_vllm.transfer.layouts import Brought, BucketLayouts, Described
from checkpoint_engine_vllm.transfer.receiver import Receiver
from checkpoint_engine_vllm.transfer.shared_memory import SharedTensors

__all__ = ["IpcInitInfo", "IpcReceiver", "IpcUpdateInfo"]


@dataclass
class IpcInitInfo:
    """Of a connection. Each update shows whether it is packed."""

    packed: bool | None = None


@dataclass
class IpcUpdateInfo:
    """One call of an update, in the fields of vLLM 0.25 to 0.33."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    ipc_handles: object = None
    """Packed: GPU -> handle of the buffer. Else a list, for each tensor GPU -> handle."""
    ipc_handles_pickled: str | None = None
    tensor_sizes: list[int] | None = None
    """Bytes of each tensor in the packed buffer, one after the other."""
    packed: bool | None = None

    def __post_init__(self) -> None:
        """Reads what is pickled, and checks that the lists belong together.

        Raises:
            ValueError: they do not.
        """
        if (self.ipc_handles is None) == (self.ipc_handles_pickled is None):
            raise ValueError("give one of `ipc_handles` and `ipc_handles_pickled`")
        if self.ipc_handles_pickled is not None:
            self.ipc_handles, self.ipc_handles_pickled = read_pickled(self.ipc_handles_pickled), None
        self.packed = isinstance(self.ipc_handles, Mapping)
        lists: dict[str, object] = {"dtype_names": self.dtype_names, "shapes": self.shapes}
        lists["tensor_sizes" if self.packed else "ipc_handles"] = self.tensor_sizes if self.packed else self.ipc_handles
        for name, given in lists.items():
            if not isinstance(given, list) or len(cast("list[object]", given)) != len(self.names):
                raise ValueError(f"`{name}` is no list with an entry for each of `names`")

    def described(self) -> Described:
        """Name, dtype and shape of each tensor."""
        return tuple(zip(self.names, self.dtype_names, map(tuple, self.shapes), strict=True))


class IpcReceiver(Receiver):
    """The backend `checkpoint_engine_ipc`."""

    door = "checkpoint_engine_ipc"
    init_info_cls = IpcInitInfo
    update_info_cls = IpcUpdateInfo

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.shared = SharedTensors(compat.device_of(self.worker))
        self._layouts = BucketLayouts()

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:  # noqa: ARG002 - vLLM's own signature
        """Nothing is connected: memory is shared."""
        self.give_up()

    def receive_weights(self, update_info: IpcUpdateInfo) -> None:
        """Takes over what one call brings."""
        self.take(self.tensors_of(update_info))

    def tensors_of(self, update_info: IpcUpdateInfo) -> Brought:
        """What one call brings, where it lies in the trainer's memory.

        Raises:
            ValueError: the handles do not hold what is said of them.
        """
        described, device = update_info.described(), self.shared.device
        if len({name for name, _, _ in described}) < len(described):
            raise ValueError("`names` has a name twice")
        if update_info.packed:
            memory = self.shared.open(read_handle(update_info.ipc_handles, device))
            return self._layouts.packed(memory.view(torch.uint8), described, tuple(update_info.tensor_sizes or ()))
        handles = cast("Sequence[object]", update_info.ipc_handles)
        opened = [self.shared.open(read_handle(handle, device)) for handle in handles]
        return self._layouts.apart(described, opened)

    def close_memory(self) -> None:
        """Gives the trainer's memory back."""
        self.shared.close()
        self._layouts.end_of_update()
