"""The trainer's side of the backend `checkpoint_engine` (vLLM 0.27 and newer): `send_weights()` publishes through us.

    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.base import ModuleSource

    trainer = NativeTrainer.trainer_init(
        NativeTrainerInitInfo(rank=0), client=HTTPVLLMWeightSyncClient(url), source=ModuleSource(model)
    )
    trainer.send_weights()

Every rank of the trainer makes one. Tensors of a module stay where they are, shards are never gathered. Those of any
other source are made for each step, so they are kept in host memory meanwhile.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch

from checkpoint_engine.sdk import MissingDependencyError, SettingError, limits
from checkpoint_engine.sdk.publishing import ParameterServer
from checkpoint_engine_vllm import compat
from checkpoint_engine_vllm.transfer.backends import NATIVE

__all__ = ["NativeTrainer", "NativeTrainerInitInfo"]

_base: Any = importlib.import_module("vllm.distributed.weight_transfer.base")
if not hasattr(_base, "TrainerWeightTransferEngine"):
    raise MissingDependencyError(
        f"vLLM {compat.version()} lacks a trainer side; call ParameterServer.publish, with the four calls in it"
    )


@dataclass(kw_only=True)
class NativeTrainerInitInfo(_base.TrainerInitInfo):
    """One rank of the trainer; each feeds the engine's worker of the same number, on its host."""

    backend: ClassVar[str] = NATIVE

    world_size: int = 1
    """Ranks of the trainer."""
    workers: int = 1
    """Of the engine, that each rank feeds."""
    master_addr: str | None = None
    """Where the ranks meet; None for `MASTER_ADDR`, or where torch's default group has met."""
    master_port: int | None = None
    device: str | None = None
    """`cpu` or `cuda`; what there is, if None."""
    method: str = "auto"
    """`broadcast`, `direct` or `auto`."""
    timeout: float = limits.UPDATE
    """Seconds for one `send_weights`."""


class NativeTrainer(_base.TrainerWeightTransferEngine):
    """See vLLM's `TrainerWeightTransferEngine`. Pausing and resuming the engine is up to whoever calls it."""

    init_info_cls = NativeTrainerInitInfo

    def __init__(self, init_info: NativeTrainerInitInfo, *, client: Any, source: Any) -> None:  # noqa: ANN401 - vLLM's own
        rank: int = init_info.rank
        _base.TrainerWeightTransferEngine.__init__(self, client=client, source=source, is_sender=rank == 0)
        self._client, self._source = client, source
        self._init = init_info
        self._rank, self._ranks, self._sends = rank, init_info.world_size, rank == 0
        self._kept: dict[str, torch.Tensor] = {}
        self._sent = 0
        self._server = ParameterServer(
            rank=rank,
            world_size=init_info.world_size,
            master_addr=init_info.master_addr,
            master_port=init_info.master_port,
            device=init_info.device,
        )

    @classmethod
    def trainer_init(
        cls,
        init_info: NativeTrainerInitInfo,
        *,
        client: Any,  # noqa: ANN401 - vLLM's own
        source: Any = None,  # noqa: ANN401 - vLLM's own
    ) -> NativeTrainer:
        """Called on every rank of the trainer; rank 0 alone speaks to the engine.

        Raises:
            SettingError: there is no source.
        """
        if source is None:
            raise SettingError("give a `source`: vLLM's ModuleSource(model), or another WeightSource")
        trainer = cls(init_info, client=client, source=source)
        if init_info.rank == 0:
            client.init_weight_transfer_engine({})
        return trainer

    def send_weights(self, version: str | None = None) -> None:
        """Brings the weights as they are now to all workers; called on every rank.

        Args:
            version: What the engine shall call them; the number of this call if None.

        Raises:
            CheckpointEngineError: it did not succeed; the engine's status says what it holds, the next call heals.
        """
        self._sent += 1
        name = version or f"step {self._sent}"
        self._server.publish(
            self._tensors(),
            lambda handles: self._ask(dict(handles), name),
            version=name,
            timeout=timedelta(seconds=self._init.timeout),
            method=self._init.method,
            workers=self._init.workers,
        )

    def shutdown(self) -> None:
        """Lets go of all memory."""
        self._kept.clear()
        self._server.close()

    # -- inside

    def _ask(self, handles: Mapping[str, str], version: str) -> None:
        if not self._sends:
            return
        finish = self._client.finish_weight_update
        takes_version = bool(inspect.signature(finish).parameters)  # 0.27 and newer
        self._client.start_weight_update()
        self._client.update_weights({"handles": dict(handles), "version": version, "timeout": self._init.timeout})
        finish(*([version] if takes_version else []))

    def _tensors(self) -> Mapping[str, torch.Tensor]:
        """What this rank gives: of a module its own parameters, where they are; of another source what it makes."""
        if type(self._source) is not _base.ModuleSource:
            return self._made()
        named: Iterable[tuple[str, torch.Tensor]] = self._source._module.named_parameters()  # noqa: SLF001
        held = {name: parameter.detach() for name, parameter in named}
        mine = itertools.islice((name for name in held if not _is_shard(held[name])), self._rank, None, self._ranks)
        whole = set(mine)  # what all ranks have alike, each gives a part of
        return {name: tensor for name, tensor in held.items() if _is_shard(tensor) or name in whole}

    def _made(self) -> Mapping[str, torch.Tensor]:
        """Copies: what a source makes is gone with the next tensor. All ranks run through it together."""
        names, kept = self._held_names(), self._kept
        source = self._source
        pairs: Iterable[tuple[str, torch.Tensor | None]] = (
            source.iter_full() if hasattr(source, "iter_full") else iter(source)
        )
        for name, tensor in pairs:
            if tensor is None or (not self._sends if names is None else name not in names):
                continue
            if name not in kept or (kept[name].shape, kept[name].dtype) != (tensor.shape, tensor.dtype):
                kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                if self._server.device_manager.device_type == "cpu":
                    kept[name].share_memory_()  # so that workers map it
            kept[name].copy_(tensor)
        return kept

    def _held_names(self) -> frozenset[str] | None:
        """Of a source that is spread over ranks; None if every rank has all, and rank 0 gives it."""
        if hasattr(self._source, "owned_names"):  # 0.33
            metadata: Any = self._source.metadata
            owned = frozenset[str](self._source.owned_names(self._rank))
            return None if len(owned) == len(metadata) else owned
        held: Any = getattr(self._source, "held_names", lambda: None)()
        return None if held is None else frozenset[str](held)


def _is_shard(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
