"""What can happen to seeds and joiners in the middle of a join; each is a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cluster import TIMEOUT, Cluster, assert_no_threads_left
from p2p_help import needs_mooncake
from p2p_processes import ENVIRONMENT, Joiner, Seed, tensors_of

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import DeadlineError, UpdateError
from checkpoint_engine.pulling import pull_tensors

pytestmark = needs_mooncake


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def here() -> Iterator[Cluster]:
    cluster = Cluster(1)
    yield cluster
    cluster.close()
    assert_no_threads_left()


@pytest.fixture(scope="module")
def survivor() -> Iterator[Seed]:
    """A seed to which nothing happens; the seeds that suffer are new in every test."""
    with Seed() as seed:
        yield seed
        assert seed.alive


def join(
    cluster: Cluster, catalogs: list[Catalog], at_bucket: int = 0, then: Callable[[], object] | None = None
) -> None:
    """Joins; when bucket `at_bucket` comes, `then` is called. Reads are a few buckets ahead at that time."""
    recorder = cluster.recorders[0]
    before = recorder.buckets

    def on_load() -> None:
        if then is not None and recorder.buckets - before == at_bucket:
            then()

    recorder.on_load = on_load
    cluster.servers[0].load_catalogs(catalogs)
    cluster.servers[0].update("a", cluster.asker(0), timeout=timedelta(seconds=2 * TIMEOUT))


def assert_holds(cluster: Cluster, version: int) -> None:
    loaded, expected = cluster.recorders[0].loaded, tensors_of(version)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_another_seed_takes_over_for_one_that_is_killed(here: Cluster, survivor: Seed) -> None:
    with Seed(2) as victim:
        join(here, [victim.catalog, survivor.catalog], 3, lambda: victim.signal("SIGKILL"))
        assert_holds(here, 1)
        join(here, [victim.catalog, survivor.catalog])
        assert_holds(here, 1)


def test_without_another_seed_the_error_names_it_and_a_later_try_succeeds(here: Cluster, survivor: Seed) -> None:
    with Seed() as seed:
        started = time.monotonic()
        with pytest.raises(UpdateError, match=r"rank 0 on .* at 127\.0\.0\.1:\d+ .*nobody listens there") as failed:
            join(here, [seed.catalog], 3, lambda: seed.signal("SIGKILL"))
        assert time.monotonic() - started < TIMEOUT
        assert "'layer." in str(failed.value)
        assert "its only holder" in str(failed.value)
        assert here.recorders[0].aborts == 1
        with pytest.raises(UpdateError, match="nobody listens there"):
            join(here, [seed.catalog])
    join(here, [survivor.catalog])
    assert_holds(here, 1)


def test_another_seed_takes_over_for_one_that_hangs(here: Cluster, survivor: Seed) -> None:
    with Seed() as victim:
        join(here, [victim.catalog, survivor.catalog], 3, lambda: victim.signal("SIGSTOP"))
        assert_holds(here, 1)


def test_versions_are_not_mixed_when_a_seed_moves_on(here: Cluster) -> None:
    with Seed(2) as seed:
        catalogs: list[Catalog] = []
        with pytest.raises(UpdateError, match="no longer holds what its metas say"):
            join(here, [seed.catalog], 3, lambda: catalogs.append(seed.move()))
        assert catalogs[0].fingerprint() == seed.catalog.fingerprint()
        assert catalogs[0].content != seed.catalog.content
        expected = tensors_of(1)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in here.recorders[0].loaded.items())
        with pytest.raises(UpdateError, match="no longer holds"):
            join(here, [seed.catalog])
        join(here, catalogs)
        assert_holds(here, 2)


def test_two_join_at_once_and_one_of_them_is_killed(here: Cluster, survivor: Seed, tmp_path: Path) -> None:
    with Joiner(survivor.catalog, tmp_path) as victim:
        victim.wait_until_it_loads()
        join(here, [survivor.catalog], 3, lambda: victim.signal("SIGKILL"))
        assert_holds(here, 1)
        join(here, [survivor.catalog])
        assert_holds(here, 1)


def test_a_process_pulls_tensors_without_ranks_or_engine(survivor: Seed) -> None:
    pulled = dict(pull_tensors([survivor.catalog], timeout=TIMEOUT))
    expected = tensors_of(1)
    assert pulled.keys() == expected.keys()
    assert all(torch.equal(pulled[name], tensor) for name, tensor in expected.items())
    with pytest.raises(DeadlineError, match=r"within 0\.001 s"):
        dict(pull_tensors([survivor.catalog], timeout=0.001))
