"""A thousand updates of each kind in one process: what it holds afterwards is what it held after the first few.

`ENDURANCE_UPDATES` says another number.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.core.cluster import Cluster
from tests.core.p2p_help import needs_mooncake
from tests.core.p2p_processes import tensors_of
from tests.core.soak_fleet import Fleet, Way, open_fleet

pytestmark = [pytest.mark.endurance, pytest.mark.timeout(3600)]

UPDATES = int(os.environ.get("ENDURANCE_UPDATES", "1000"))
SETTLED = 20
"""Updates after which nothing is new to anybody."""
SPREAD = 3
"""Descriptors and the like that come and go; a leak is one for every update, or for every tenth."""
MOST_MEMORY = 64 << 20
"""Bytes: what allocators keep for the next time."""


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def check_that_nothing_grows(fleet: Fleet, update: Callable[[int], None]) -> None:
    for number in range(SETTLED):
        update(number)
    before, memory = fleet.left_behind(), resident()
    for number in range(UPDATES):
        update(number)
    after, grown = fleet.left_behind(), resident() - memory
    print(f"{UPDATES} updates, {before} -> {after}, {grown / 1e6:+.1f} MB")
    assert {name: after[name] - before[name] for name in after if after[name] - before[name] > SPREAD} == {}
    assert grown < MOST_MEMORY


@needs_mooncake
@pytest.mark.parametrize("way", ["broadcast", "direct", "join"])
def test_nothing_grows_in_a_thousand_updates(way: Way) -> None:
    with open_fleet() as fleet:

        def update(number: int) -> None:
            assert fleet.update(way, "none") == [], number

        check_that_nothing_grows(fleet, update)


def test_nothing_grows_in_a_thousand_steps_of_a_trainer(clusters: Callable[[int], Cluster]) -> None:
    """In place: host memory that is shared is to the CPU what device memory is to a GPU."""
    cluster = clusters(2)
    tensors = {name: tensor.clone().share_memory_() for name, tensor in tensors_of(1).items()}
    shares = [{name: tensors[name] for name in list(tensors)[rank::2]} for rank in range(2)]

    def update(number: int) -> None:
        for tensor in tensors.values():
            tensor.add_(1)
        cluster.publish(shares, f"v{number}", "direct")
        for recorder in cluster.recorders:
            assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors.items())

    check_that_nothing_grows(Fleet(cluster, cluster, set()), update)
