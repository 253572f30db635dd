"""Reading other processes' memory by address, under the name that existing users import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoint_engine.device import accelerator_count
from checkpoint_engine.device_utils import DeviceManager, get_ip
from checkpoint_engine.errors import CheckpointStateError, PeerError
from checkpoint_engine.p2p.open import open_p2p_engine
from checkpoint_engine.settings import P2PSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

__all__ = ["P2PStore"]


class P2PStore:
    """Mooncake's transfer engine with names for memory. Nobody checks what lies at an address."""

    def __init__(self, device_manager: DeviceManager) -> None:
        """Starts to listen.

        Raises:
            MissingDependencyError: Mooncake is not installed.
            SettingError: the transport cannot be used here.
        """
        module = device_manager.device_module
        gpu = module.current_device() if device_manager.device_type != "cpu" else 0
        self._engine, _ = open_p2p_engine(P2PSettings.from_environment(), get_ip(), int(gpu), accelerator_count())
        self._addresses: dict[str, int] = {}

    @property
    def addr(self) -> str:
        """Where peers find it."""
        return self._engine.address

    def register_named_tensors(self, named_tensors: Mapping[str, torch.Tensor]) -> None:
        """Lets others read tensors, and reads land in them, until `unregister_named_tensors`.

        Raises:
            CheckpointStateError: a name is registered.
            HostMemoryError: the network card cannot register it.
        """
        for name, tensor in named_tensors.items():
            if name in self._addresses:
                raise CheckpointStateError(f"{name!r} is registered; unregister it first")
            self._engine.register(tensor.data_ptr(), tensor.nbytes)
            self._addresses[name] = tensor.data_ptr()

    def unregister_named_tensors(self, names: Sequence[str]) -> int:
        """Ends that; returns how many there were."""
        known = [name for name in names if name in self._addresses]
        for name in known:
            self._engine.unregister(self._addresses.pop(name))
        return len(known)

    def batch_transfer_sync_read(
        self, target_hostname: str, buf_ptrs: Sequence[int], remote_ptrs: Sequence[int], lens: Sequence[int]
    ) -> None:
        """Reads ranges of a peer's memory into registered memory of this process; returns once they have come.

        Raises:
            PeerError: they cannot be read.
        """
        if not self._engine.read(target_hostname, buf_ptrs, remote_ptrs, lens):
            raise PeerError(
                f"{sum(lens)} bytes of {target_hostname} could not be read; is it up, and does it share them?"
            )
