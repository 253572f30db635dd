"""Ranks of a parameter server in verl's processes: what they have of a trainer's weights, and who takes them."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import AsyncIterable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from typing_extensions import Self

from checkpoint_engine.device_utils import get_ip
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.settings import SECRET_VARIABLE
from checkpoint_engine.transfer.order import RequestFunction
from checkpoint_engine.transfer.report import UpdateReport

__all__ = ["MeetingPoint", "NamedWeights", "WeightExchange"]

NamedWeights = Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]]
"""Whole tensors, one after the other, the same ones in the same order on all of a trainer's ranks."""

_NAME = "verl"


@dataclass(frozen=True)
class MeetingPoint:
    """Where ranks meet, and what they know each other by."""

    address: str
    port: int
    secret: str

    @classmethod
    def here(cls) -> Self:
        """On this host, at a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return cls(get_ip(), port, secrets.token_urlsafe())

    @classmethod
    def of_default_group(cls) -> Self | None:
        """Where the ranks of torch's default group meet if they share a host; None if they do not.

        Raises:
            RuntimeError: torch's, if a rank is gone.
        """
        host = int.from_bytes(hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest(), "big")
        mine = torch.tensor([host, cls.here().port])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        cast("Any", dist).all_gather(ranks, mine)
        one = len({int(rank[0]) for rank in ranks}) == 1
        return cls("127.0.0.1", int(ranks[0][1]), "") if one else None


class WeightExchange:
    """One rank: of a trainer's, or beside an engine's worker, or both at once."""

    def __init__(self, rank: int, ranks: int, at: MeetingPoint | None, *, device: str | None, timeout: float) -> None:
        """Connects the ranks.

        Args:
            rank: This one.
            ranks: How many there are.
            at: Where they meet; None if these are the ranks of torch's default group, on several hosts.
            device: As `ParameterServer` takes it.
            timeout: In seconds, for every call.

        Raises:
            DeadlineError: not all ranks came in time.
        """
        self.rank, self._ranks = rank, ranks
        self._timeout = timedelta(seconds=timeout)
        if at is not None and at.secret:
            os.environ[SECRET_VARIABLE] = at.secret
        self._server = ParameterServer(
            rank=rank,
            world_size=ranks,
            device=device,
            master_addr=at.address if at else None,
            master_port=at.port if at else None,
        )
        with nullcontext() if at is None or at.secret else _not_alone():
            self._server.init_process_group(timeout=self._timeout)

    async def take(self, weights: NamedWeights, sharers: int) -> dict[str, torch.Tensor]:
        """This rank's share of a trainer's weights, in host memory: one tensor in so many as there are sharers."""
        own: dict[str, torch.Tensor] = {}
        number = 0
        async for name, tensor in _each(weights):
            if number % sharers == self.rank:  # verl may write the next one to the same memory
                own[name] = tensor.detach().to("cpu", copy=True)
            number += 1
        return own

    def bring(
        self,
        own: Mapping[str, torch.Tensor],
        ask: RequestFunction,
        version: str,
        receivers: Sequence[int] | None = None,
    ) -> UpdateReport | None:
        """Brings what all ranks have to the engine workers of the receivers; of all ranks if None.

        Raises:
            CheckpointEngineError: as `ParameterServer.update`.
        """
        server = self._server
        server.register_checkpoint(_NAME, named_tensors=own, use_shared_memory_pool=True)
        try:
            server.gather_metas(_NAME, timeout=self._timeout)
            everywhere = receivers is None or len(receivers) == self._ranks
            server.update(
                _NAME,
                ask,
                ranks=receivers,
                timeout=self._timeout,
                version=version,
                method="auto" if everywhere else "broadcast",
            )
        finally:
            server.unregister_checkpoint(_NAME)
        return server.last_report

    def close(self) -> None:
        """Leaves the other ranks and frees all memory."""
        self._server.close()


@contextmanager
def _not_alone() -> Generator[None]:
    """Hides what verl tells every process: that no other one is on its host."""
    told = os.environ.pop("LOCAL_WORLD_SIZE", None)
    try:
        yield
    finally:
        if told is not None:
            os.environ["LOCAL_WORLD_SIZE"] = told


async def _each(weights: NamedWeights) -> AsyncIterable[tuple[str, torch.Tensor]]:
    if isinstance(weights, AsyncIterable):
        async for item in weights:
            yield item
    else:
        for item in weights:
            yield item
