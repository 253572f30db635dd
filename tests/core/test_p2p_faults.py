"""What can happen to seeds and joiners in the middle of a join; each is a process of its own."""

from __future__ import annotations

import contextlib
import gc
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import DeadlineError, HostMemoryError, UpdateError
from checkpoint_engine.p2p.mooncake import MooncakeEngine
from checkpoint_engine.p2p.open import open_p2p_store
from checkpoint_engine.p2p.store import ByteRange, P2PStore, Peer
from checkpoint_engine.receiver.pulling import Pull
from checkpoint_engine.settings import P2PSettings
from checkpoint_engine.transfer.remote import RingCache
from tests.core.cluster import TIMEOUT, Cluster
from tests.core.p2p_help import needs_mooncake
from tests.core.p2p_processes import ENVIRONMENT, Joiner, Seed, tensors_of

pytestmark = [needs_mooncake, pytest.mark.usefixtures("p2p_environment")]

PATIENCE = float(ENVIRONMENT["CHECKPOINT_ENGINE_P2P_PATIENCE"])


@pytest.fixture
def here(clusters: Callable[[int], Cluster]) -> Cluster:
    return clusters(1)


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


@pytest.mark.long
def test_another_seed_takes_over_for_one_that_hangs(here: Cluster, survivor: Seed) -> None:
    with Seed() as victim:
        join(here, [victim.catalog, survivor.catalog], 3, lambda: victim.signal("SIGSTOP"))
        assert_holds(here, 1)


@pytest.mark.long
def test_a_seed_that_hung_before_anybody_came_is_given_up_within_its_patience(here: Cluster, survivor: Seed) -> None:
    with Seed() as victim:
        victim.signal("SIGSTOP")
        started = time.monotonic()
        with pytest.raises(UpdateError, match="accepts connections and answers nothing within 3 s"):
            join(here, [victim.catalog])
        assert time.monotonic() - started < 3 * PATIENCE
        join(here, [victim.catalog, survivor.catalog])
        assert_holds(here, 1)
        victim.signal("SIGCONT")
        join(here, [victim.catalog])
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


def test_two_join_at_once_and_one_of_them_is_killed(here: Cluster, survivor: Seed) -> None:
    with Joiner(survivor.catalog) as victim:
        victim.wait_until_it_loads()
        join(here, [survivor.catalog], 3, lambda: victim.signal("SIGKILL"))
        assert_holds(here, 1)
        join(here, [survivor.catalog])
        assert_holds(here, 1)


def test_a_process_pulls_tensors_without_ranks_or_engine(survivor: Seed) -> None:
    pulled = dict(Pull([survivor.catalog], timeout=TIMEOUT).tensors())
    expected = tensors_of(1)
    assert pulled.keys() == expected.keys()
    assert all(torch.equal(pulled[name], tensor) for name, tensor in expected.items())
    with pytest.raises(DeadlineError, match=r"within 0\.001 s"):
        dict(Pull([survivor.catalog], timeout=0.001).tensors())


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses that the engine knows, of those that it learned during the test."""
    registered: list[int] = []
    register, unregister = MooncakeEngine.register, MooncakeEngine.unregister

    def registering(engine: MooncakeEngine, address: int, nbytes: int) -> None:
        register(engine, address, nbytes)
        registered.append(address)

    def unregistering(engine: MooncakeEngine, address: int) -> None:
        unregister(engine, address)
        if address in registered:
            registered.remove(address)

    monkeypatch.setattr(MooncakeEngine, "register", registering)
    monkeypatch.setattr(MooncakeEngine, "unregister", unregistering)
    return registered


def test_pulling_leaves_nothing_registered(survivor: Seed, registered: list[int]) -> None:
    for _ in range(3):
        dict(Pull([survivor.catalog], timeout=TIMEOUT).tensors())
    late_answers = 3  # may land in a page of each, which is never unmapped
    assert len(registered) == late_answers


@pytest.mark.long
def test_reads_that_fail_after_all_was_given_up_leave_nothing_registered(
    registered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_P2P_PATIENCE", "4.5")  # they outlast the deadline and the goodbye by far
    with Seed() as seed:
        tensors = Pull([seed.catalog], timeout=2).tensors()
        next(tensors)
        seed.signal("SIGSTOP")
        with pytest.raises(DeadlineError):
            list(tensors)
        assert running("fetch"), "reads ended while they were waited for: this test shows nothing"
        until = time.monotonic() + TIMEOUT
        while running("fetch", "retire") and time.monotonic() < until:
            time.sleep(0.05)
        assert not running("fetch", "retire")
    late_answers = 1
    assert len(registered) == late_answers


@pytest.mark.parametrize("keeper", [False, True], ids=["pull", "ring"])
def test_memory_that_cannot_be_registered_is_given_back(
    survivor: Seed, monkeypatch: pytest.MonkeyPatch, keeper: bool
) -> None:
    with contextlib.closing(open_p2p_store(P2PSettings.from_environment(), "127.0.0.1", 0, 0)) as store:
        register = MooncakeEngine.register

        def refusing(engine: MooncakeEngine, address: int, nbytes: int) -> None:
            if nbytes > mmap.PAGESIZE:
                raise HostMemoryError("refused by the test")
            register(engine, address, nbytes)

        monkeypatch.setattr(MooncakeEngine, "register", refusing)
        before = anonymous_segments()
        for _ in range(4):
            with pytest.raises(HostMemoryError, match="refused by the test"):
                RingCache(lambda: store).take(1 << 20) if keeper else dict(Pull([survivor.catalog]).tensors())
        pages = 0 if keeper else 4  # of late answers
        assert anonymous_segments() - before == pages


def anonymous_segments() -> int:
    """Descriptors that this process holds of them."""
    gc.collect()
    names = (entry.readlink().name for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum("checkpoint-engine-segment" in name for name in names)


def running(*kinds: str) -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(tuple(f"checkpoint-engine-{kind}" for kind in kinds))]


class Pair:
    """One of two threads that share the reading; what one hands on is copied by the other."""

    size = 2
    device = torch.device("cpu")

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[torch.Tensor]) -> None:
        self.rank, self._meeting, self._table = rank, meeting, table

    def hand_on(self, memory: torch.Tensor, source: int) -> None:
        if self.rank == source:
            self._table[:] = [memory]
        self._meeting.wait(TIMEOUT)
        if self.rank != source:
            memory.copy_(self._table[0])
        self._meeting.wait(TIMEOUT)


def test_two_processes_that_need_the_same_read_it_once(survivor: Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = P2PStore.read

    def counting(store: P2PStore, peer: Peer, ranges: Sequence[ByteRange], check: Callable[[], None]) -> None:
        read.extend(part.nbytes for part in ranges)
        plain(store, peer, ranges, check)

    monkeypatch.setattr(P2PStore, "read", counting)
    meeting, table = threading.Barrier(2), []
    pulls = [Pull([survivor.catalog], timeout=TIMEOUT, group=Pair(rank, meeting, table)) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        pulled = [dict(tensors) for tensors in pool.map(lambda pull: list(pull.tensors()), pulls)]
    expected = tensors_of(1)
    for tensors in pulled:
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    shares = [pull.nbytes for pull in pulls]
    assert sum(read) == sum(shares) < 1.01 * survivor.catalog.nbytes  # gaps of alignment are read along
    assert min(shares) > 0.4 * survivor.catalog.nbytes
