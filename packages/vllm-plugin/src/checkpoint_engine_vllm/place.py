"""Which of the workers that one call reaches a vLLM worker is: of all data-parallel replicas behind one server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from checkpoint_engine_vllm.protocols import Worker

__all__ = ["WorkerPlace", "note_replicas", "workers_reached"]

_REPLICAS = "_checkpoint_engine_replicas"
"""What their number is kept under in vLLM's configuration, which forgets it where replicas of a dense model start."""


@dataclass(frozen=True)
class WorkerPlace:
    """Its number among them, and how many there are."""

    rank: int
    world_size: int
    replica: int = 0
    """Of which of the replicas it is one."""
    replicas: int = 1
    """How many of them there are."""
    in_step: int = 1
    """How many replicas, behind whichever server, take each step together: experts do, as what one of them has computed
    goes to the others within the step."""

    @classmethod
    def of(cls, worker: Worker) -> Self:
        """Where a worker stands."""
        parallel = worker.vllm_config.parallel_config
        replicas, in_replica = _replicas(parallel), int(parallel.world_size)
        replica = int(getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0))) % replicas
        # vLLM tells a dense model's replica that it is alone.
        in_step = int(getattr(parallel, "data_parallel_size", 1))
        return cls(replica * in_replica + int(worker.rank), replicas * in_replica, replica, replicas, in_step)


def workers_reached(parallel: Any) -> int:  # noqa: ANN401 - vLLM's own
    """How many workers one call reaches."""
    return _replicas(parallel) * int(parallel.world_size)


def note_replicas(config: object) -> None:
    """Keeps their number in a configuration that replicas are about to be given."""
    parallel: Any = getattr(config, "parallel_config", None)
    if parallel is not None:
        setattr(parallel, _REPLICAS, _replicas(parallel))


def _replicas(parallel: Any) -> int:  # noqa: ANN401 - vLLM's own
    """Behind one server: all, or those of its host, or one."""
    if getattr(parallel, "data_parallel_external_lb", False):
        return 1
    of_host = getattr(parallel, "data_parallel_hybrid_lb", False)
    now = int(getattr(parallel, "data_parallel_size_local" if of_host else "data_parallel_size", 1))
    return now if now > 1 else int(getattr(parallel, _REPLICAS, 1))
