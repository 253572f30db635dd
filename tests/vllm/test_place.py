"""Which of an engine's workers one is, by the configuration that vLLM gives it; vLLM itself is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint_engine_vllm.place import WorkerPlace, note_replicas, workers_reached


def parallel(**fields: Any) -> Any:
    """As vLLM's server has it before its replicas start."""
    return SimpleNamespace(**{"world_size": 2, "data_parallel_size": 1, "data_parallel_index": 0, **fields})


def worker(parallel: Any, rank: int) -> Any:
    return SimpleNamespace(rank=rank, vllm_config=SimpleNamespace(parallel_config=parallel))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("fields", "reached"),
    [
        ({}, 2),
        ({"data_parallel_size": 3}, 6),
        ({"data_parallel_size": 6, "data_parallel_size_local": 3, "data_parallel_hybrid_lb": True}, 6),
        ({"data_parallel_size": 3, "data_parallel_external_lb": True}, 2),
    ],
    ids=["alone", "behind one server", "a server for each host", "a server for each"],
)
def test_each_worker_that_one_call_reaches_has_a_number_of_its_own(
    dense: bool, fields: dict[str, Any], reached: int
) -> None:
    """A replica of a dense model is told that it is alone, and all but the first were told apart by luck."""
    configuration = parallel(**fields)
    note_replicas(SimpleNamespace(parallel_config=configuration))
    assert workers_reached(configuration) == reached
    places = []
    for replica in range(reached // 2):
        started = SimpleNamespace(**vars(configuration))
        started.data_parallel_index = replica + (3 if "data_parallel_hybrid_lb" in fields else 0)  # the second host's
        if dense:
            started.data_parallel_size = started.data_parallel_size_local = 1
        places += [WorkerPlace.of(worker(started, rank)) for rank in (0, 1)]
    assert [(place.rank, place.world_size, place.replica) for place in places] == [
        (number, reached, number // 2) for number in range(reached)
    ]
    together = 1 if dense else fields.get("data_parallel_size", 1)
    assert {(place.replicas, place.in_step) for place in places} == {(reached // 2, together)}
