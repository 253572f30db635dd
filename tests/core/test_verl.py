"""What verl's backend is made of, without verl: who is which rank, and ranks that bring weights to others' workers."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
import torch

from checkpoint_engine.device import open_device
from checkpoint_engine.errors import CheckpointStateError
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.verl.exchange import MeetingPoint, WeightExchange
from checkpoint_engine.verl.topology import Preparation, plan_topology
from tests.core.cluster import Recorder, assert_no_threads_left
from tests.core.p2p_help import needs_mooncake
from tests.ports import free_port


def test_verl_finds_the_backend() -> None:
    found = {point.name: point.value for point in metadata.entry_points(group="verl.plugins")}
    assert found["checkpoint_engine"] == "checkpoint_engine.verl.plugin"
    assert importlib.util.find_spec(found["checkpoint_engine"]) is not None


def process(rank: int, run: str = "", host: str = "here", *, first: bool = False) -> Preparation:
    return {
        "host": host,
        "run": run,
        "rank": rank,
        "ranks": 3,
        "offer": ("10.0.0.1", 5000, "secret") if first else None,
    }


def test_ranks_meet_once_and_anew_when_one_is_new() -> None:
    trainers, rollouts = plan_topology(1, 2, [process(-1, first=True), process(-1), process(-1)])
    assert trainers == {
        "rank": [0],
        "ranks": [3],
        "trainers": [1],
        "run": ["127.0.0.1:5000"],
        "at": [("127.0.0.1", 5000, "")],
    }
    assert rollouts["rank"] == [1, 2]
    assert {key: values[1:] for key, values in rollouts.items() if key != "rank"} == {
        key: values for key, values in trainers.items() if key != "rank"
    }
    met = [process(0, "old", first=True), process(1, "old"), process(2, "old")]
    assert plan_topology(1, 2, met)[1]["run"] == ["old", "old"]
    for other in (process(-1), process(1, "other"), process(2, "old")):
        assert plan_topology(1, 2, [met[0], other, met[2]])[1]["run"] == ["127.0.0.1:5000"] * 2
    assert plan_topology(1, 1, met[:2])[1]["run"] == ["127.0.0.1:5000"]  # they were three


def test_several_hosts_get_a_secret_and_who_is_missing_is_told() -> None:
    far = [process(-1, first=True), process(-1, host="there")]
    assert plan_topology(1, 1, far)[1]["at"] == [("10.0.0.1", 5000, "secret")]
    for told in ([process(0)], [process(0), process(1)]):
        with pytest.raises(
            CheckpointStateError, match=f"prepared {len(told)} processes of 2, of which 0 are a trainer's first"
        ):
            plan_topology(1, 1, told)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{number}": torch.randn(number + 1, 7, generator=generator) for number in range(9)}


def exchange(
    trainers: int, receivers: range, steps: int, recorders: dict[int, Recorder], check: Callable[[int], None]
) -> None:
    """All ranks as threads; those that receive have a recorder for an engine's worker."""
    at = MeetingPoint("127.0.0.1", free_port(), "")
    ranks = max(trainers, receivers.stop)

    def meet(rank: int) -> WeightExchange:
        return WeightExchange(rank, ranks, at, device="cpu", timeout=30)

    def bring(each: WeightExchange, step: int) -> None:
        own = asyncio.run(each.take(weights(step).items(), trainers)) if each.rank < trainers else {}

        def ask(handles: list[tuple[str, str]]) -> None:
            if each.rank in receivers:
                receive_update(
                    handles[each.rank][1], recorders[each.rank], open_device("cpu", rank=each.rank), timeout=30
                )

        each.bring(own, ask, f"step-{step}", receivers)

    with ThreadPoolExecutor(ranks) as pool:
        met = list(pool.map(meet, range(ranks)))
        for step in range(steps):
            list(pool.map(bring, met, [step] * ranks))
            check(step)
        for each in met:
            each.close()
    assert_no_threads_left()


@pytest.mark.parametrize(
    ("trainers", "receivers"),
    [pytest.param(2, range(2, 4), marks=needs_mooncake, id="separated"), pytest.param(2, range(2), id="colocated")],
)
@pytest.mark.usefixtures("p2p_environment")
def test_what_trainers_have_comes_whole_to_every_worker(trainers: int, receivers: range) -> None:
    recorders = {rank: Recorder() for rank in receivers}

    def check(step: int) -> None:
        expected = weights(step)
        for recorder in recorders.values():
            assert recorder.loaded.keys() == expected.keys()
            assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in expected.items())
            assert recorder.update is not None
            assert recorder.update.version == f"step-{step}"

    exchange(trainers, receivers, 3, recorders, check)
