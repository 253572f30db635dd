"""The backend itself: a trainer's ranks and those beside an engine's workers are ranks of one parameter server."""

from __future__ import annotations

import asyncio
import importlib
import socket
from collections.abc import Sequence
from typing import Any, NoReturn

from checkpoint_engine import limits
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.transfer.order import RequestFunction
from checkpoint_engine.verl.exchange import MeetingPoint, NamedWeights, WeightExchange
from checkpoint_engine.verl.topology import Address, Preparation, plan_topology

__all__ = ["WIRE_FORMAT", "IncomingWeights", "VerlBackend"]

WIRE_FORMAT = "checkpoint_engine"
"""By which a rollout of verl tells that weights do not come one by one."""

_engine: Any = importlib.import_module("verl.checkpoint_engine.base").CheckpointEngine


class VerlBackend(_engine):
    """Weights go from host memory of the trainer's ranks to engines' workers, in place, by their reload plans.

    Rollouts ask their engines to take them (`checkpoint_engine.verl.rollout`), and so receive no tensor themselves.
    Ranks stay connected for as long as verl's processes stay the same.
    """

    wire_format = WIRE_FORMAT

    def __init__(
        self, bucket_size: int, *, is_master: bool = False, device: str | None = None, timeout: float = limits.UPDATE
    ) -> None:
        """Made by verl.

        Args:
            bucket_size: Ignored; `PS_MAX_BUCKET_SIZE_GB` has that of the parameter server.
            is_master: Whether this is the trainer's first rank.
            device: `cpu` or `cuda`; what is there if None.
            timeout: For an update, in seconds.
        """
        del bucket_size
        self._is_master, self._device, self._timeout = is_master, device, timeout
        self._run = ""
        self._trainers = self._ranks = 0
        self._exchange: WeightExchange | None = None

    def prepare(self) -> Preparation:
        """Tells where ranks can meet, and whether they have met."""
        at = MeetingPoint.here() if self._is_master else None
        rank = self._exchange.rank if self._exchange else -1
        return {
            "host": socket.gethostname(),
            "run": self._run,
            "rank": rank,
            "ranks": self._ranks,
            "offer": (at.address, at.port, at.secret) if at else None,
        }

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: Sequence[Preparation]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """See `plan_topology`."""
        return plan_topology(actor_wg_world_size, rollout_world_size, metadata)

    def init_process_group(self, rank: int, ranks: int, trainers: int, run: str, at: Address) -> None:
        """Connects the ranks, unless these are connected.

        Raises:
            DeadlineError: not all of them came in time.
        """
        if run == self._run:
            return
        self._close()
        self._exchange = WeightExchange(rank, ranks, MeetingPoint(*at), device=self._device, timeout=self._timeout)
        self._run, self._ranks, self._trainers = run, ranks, trainers

    async def send_weights(self, weights: NamedWeights, global_steps: int | None = None) -> dict[str, float]:
        """Gives this rank's share of the trainer's weights, and returns once every engine worker has them all.

        Returns figures for verl's log.

        Raises:
            CheckpointEngineError: the update did not complete.
        """
        exchange = self._connected()
        own = await exchange.take(weights, self._trainers)
        report = await asyncio.to_thread(exchange.bring, own, lambda _: None, _version_of(global_steps), self.receivers)
        return (
            {f"checkpoint_engine/{name}_seconds": seconds for name, seconds in report.seconds.items()} if report else {}
        )

    def receive_weights(self, global_steps: int | None = None) -> IncomingWeights:
        """What a rollout has its engine take."""
        return IncomingWeights(self._connected(), self.receivers, _version_of(global_steps))

    def finalize(self) -> None:
        """Nothing: ranks stay connected, and their memory is used again."""

    @property
    def receivers(self) -> range:
        """Ranks beside engines' workers."""
        return range(self._trainers, self._ranks)

    def _connected(self) -> WeightExchange:
        if self._exchange is None:
            raise CheckpointStateError("verl has not connected the ranks: init_process_group comes first")
        return self._exchange

    def _close(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange, self._run = None, ""


class IncomingWeights:
    """An update that this rank's engine worker is to take."""

    def __init__(self, exchange: WeightExchange, receivers: Sequence[int], version: str) -> None:
        self._exchange, self._receivers, self.version = exchange, receivers, version

    async def into(self, ask: RequestFunction) -> None:
        """Has this rank's engine worker take it; `ask` gets (device identity, handle) of this and all later ranks.

        Raises:
            CheckpointEngineError: it did not take it.
        """
        rank = self._exchange.rank
        await asyncio.to_thread(
            self._exchange.bring, {}, lambda handles: ask(handles[rank:]), self.version, self._receivers
        )

    def __aiter__(self) -> NoReturn:
        """For rollouts that know nothing of this.

        Raises:
            CheckpointStateError: always.
        """
        raise CheckpointStateError(
            "the backend checkpoint_engine gives weights to engines' workers, not to rollouts: use verl's vllm rollout "
            "with checkpoint-engine-vllm installed beside it, or another backend for this rollout"
        )


def _version_of(global_steps: int | None) -> str:
    return "verl" if global_steps is None else f"step-{global_steps}"
