"""A trainer's ranks in the test process, each with its shards of a checkpoint, that publish into a real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from tests.core.cluster import TIMEOUT, Cluster
from tests.core.test_shards import DEALINGS, dealt

__all__ = ["ShardingTrainer"]


class Updated(Protocol):
    """The client of an engine."""

    def update_weights(
        self, handles: Mapping[str, str], *, version: str, pause: str, reset_caches: bool, timeout: float
    ) -> None: ...


class ShardingTrainer(Cluster):
    """As many ranks as the engine has workers; rank 0 asks it."""

    def __init__(self, size: int, client: Updated) -> None:
        super().__init__(size)
        self._client, self._version = client, ""

    def step(self, tensors: Mapping[str, torch.Tensor], dealing: str, method: str, version: str) -> None:
        """Deals a checkpoint out to two ranks, or all of it in two shards to one, and has the engine serve it."""
        shares = dealt(tensors, DEALINGS[dealing], 2)
        if len(self.servers) == 1:
            both = {name: (shares[0].get(name), shares[1].get(name)) for name in {**shares[0], **shares[1]}}
            shares = [{name: _joined(*parts) for name, parts in both.items()}]
        self._version = version
        self.publish(shares, version, method, in_place=method == "direct")

    def asker(self, rank: int) -> Callable[[list[tuple[str, str]]], None]:
        def ask(handles: list[tuple[str, str]]) -> None:
            if rank == 0:
                self._client.update_weights(
                    dict(handles), version=self._version, pause="keep", reset_caches=True, timeout=TIMEOUT
                )

        return ask


def _joined(first: object, second: object) -> object:
    """What one rank has if it is both; a copy that both have it gives once."""
    parts = [part for part in (first, second) if part is not None]
    if any(isinstance(part, torch.Tensor) for part in parts):
        return parts[0]
    return [shard for part in parts for shard in (part if isinstance(part, list) else [part])]
