"""Direct updates across hosts: one host, told to take itself for several; the reads are those of Mooncake."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.contract.sink import Update
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.link.messages import Wanted
from checkpoint_engine.p2p.store import ByteRange, P2PStore, Peer
from checkpoint_engine.planning.buckets import Bucket, BucketPlan
from checkpoint_engine.reload.reloader import Reloader
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.transfer import direct
from checkpoint_engine.transfer.exports import Export, export_segments
from checkpoint_engine.transfer.remote import unite
from tests.core.cluster import Cluster, check
from tests.core.p2p_help import needs_mooncake

HOSTS = ("red", "red", "blue")


@pytest.fixture(autouse=True)
def environment(p2p_environment: None, set_bucket_size: Callable[[int], None]) -> None:
    set_bucket_size(512 << 10)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch, clusters: Callable[[int], Cluster]) -> Callable[..., Cluster]:
    def make(names: Sequence[str], *, share: bool = True) -> Cluster:
        monkeypatch.setenv("CHECKPOINT_ENGINE_P2P", "1" if share else "0")
        cluster = clusters(len(names))

        def export(segments: Sequence[Segment]) -> Export:
            """Of the rank that holds these segments; a ring is nobody's."""
            for server, name in zip(cluster.servers, names, strict=True):
                held = [segment for each in server.checkpoints for segment in server._store.get(each).segments]
                if any(segment is mine for segment in segments for mine in held):
                    return msgspec.structs.replace(export_segments(segments), host=name)
            return export_segments(segments)

        monkeypatch.setattr(direct, "export_segments", export)
        return cluster

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[ByteRange]:
    """Everything that is fetched."""
    fetched: list[ByteRange] = []
    read = P2PStore.read

    def note(store: P2PStore, peer: Peer, ranges: Sequence[ByteRange], check: Callable[[], None]) -> None:
        fetched.extend(ranges)
        read(store, peer, ranges, check)

    monkeypatch.setattr(P2PStore, "read", note)
    return fetched


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    """Rows that are cut in two, columns that are, and what both workers keep."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(6):
        tensors[f"{layer}.rows"] = torch.randn(64, 1024, generator=generator)
        tensors[f"{layer}.columns"] = torch.randn(8, 16384, generator=generator)
        tensors[f"{layer}.norm"] = torch.randn(64, generator=generator)
    return tensors


def part_of(name: str, tensor: torch.Tensor, worker: int, workers: int) -> torch.Tensor:
    axis = {"rows": 0, "columns": 1}.get(name.partition(".")[2])
    return tensor if axis is None else tensor.chunk(workers, axis)[worker]


class Sharded:
    """A worker that keeps its part of every tensor, by plan as soon as that is trusted."""

    def __init__(self, worker: int, workers: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.parameters = {
            name: torch.zeros_like(part_of(name, tensor, worker, workers)).contiguous()
            for name, tensor in tensors.items()
        }
        shadow = {name: parameter.to("meta") for name, parameter in self.parameters.items()}

        def into(parameters: Mapping[str, torch.Tensor]) -> Callable[[Sequence[tuple[str, torch.Tensor]]], None]:
            def load(given: Sequence[tuple[str, torch.Tensor]]) -> None:
                for name, tensor in given:
                    parameters[name].copy_(part_of(name, tensor, worker, workers))

            return load

        self._reloader = Reloader(into(self.parameters), self.parameters, lambda: (into(shadow), shadow))  # type: ignore[arg-type, return-value]
        self.load, self.finish, self.wanted = self._reloader.load, self._reloader.finish, self._reloader.wanted

    def begin(self, update: Update) -> None:
        self._reloader.begin(update.tensors, update.reload)

    def abort(self) -> bool:
        self._reloader.failed()
        return False


@needs_mooncake
def test_what_other_hosts_hold_is_fetched(hosts: Callable[..., Cluster], reads: list[ByteRange]) -> None:
    cluster = hosts(HOSTS)
    for seed in (1, 2, 2):
        content = tensors_of(seed)
        if f"v{seed}" not in cluster.servers[0].checkpoints:
            cluster.register(f"v{seed}", content)
        check(cluster.update(f"v{seed}", method="auto"))
        for server, recorder in zip(cluster.servers, cluster.recorders, strict=True):
            assert server.last_report is not None
            assert server.last_report.method == "direct"
            assert recorder.loaded.keys() == content.keys()
            assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in content.items())
    assert reads


@needs_mooncake
def test_of_that_only_what_the_workers_keep(hosts: Callable[..., Cluster], reads: list[ByteRange]) -> None:
    cluster = hosts(("red", "blue"))
    content = tensors_of(1)
    workers = [Sharded(rank, 2, content) for rank in range(2)]
    cluster.recorders[:] = workers  # type: ignore[list-item]
    fetched: list[int] = []
    for seed in (1, 2, 3, 4):
        content = tensors_of(seed)
        cluster.register(f"v{seed}", content)
        reads.clear()
        check(cluster.update(f"v{seed}", method="direct"))
        fetched.append(sum(part.nbytes for part in reads))
        for rank, worker in enumerate(workers):
            for name, tensor in content.items():
                assert torch.equal(worker.parameters[name], part_of(name, tensor, rank, 2)), name
    nbytes = sum(tensor.nbytes for tensor in content.values())
    assert fetched[0] >= nbytes, "each host lacks the other's half; while the plan is proved, all of it is read"
    assert 0.5 * nbytes <= fetched[2] <= 0.51 * nbytes
    assert fetched[3] == fetched[2]


@needs_mooncake
def test_a_holder_that_has_moved_on_ends_the_update(hosts: Callable[..., Cluster]) -> None:
    cluster = hosts(("red", "blue"))
    content = tensors_of(1)
    cluster.register("v1", content)
    check(cluster.update("v1", method="direct"))
    cluster.servers[1]._sharing.withdraw("v1")
    errors = cluster.update("v1", method="direct")
    assert all(isinstance(error, UpdateError) for error in errors)
    assert "no longer holds" in str(errors[0])
    check(cluster.on_all(lambda server: server.gather_metas("v1")))
    check(cluster.update("v1", method="direct"))
    assert all(torch.equal(cluster.recorders[0].loaded[name], tensor) for name, tensor in content.items())


@needs_mooncake
def test_with_checksums_what_is_damaged_on_the_way_is_named(
    hosts: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", "1")
    cluster = hosts(("red", "blue"))
    content = tensors_of(1)
    cluster.register("v1", content)
    read = P2PStore.read

    def damaging(store: P2PStore, peer: Peer, ranges: Sequence[ByteRange], check: Callable[[], None]) -> None:
        read(store, peer, ranges, check)
        ctypes.c_uint8.from_address(ranges[0].target + 7).value ^= 1

    with monkeypatch.context() as faulty:
        faulty.setattr(P2PStore, "read", damaging)
        errors = cluster.update("v1", method="direct")
    assert "did not arrive as it was registered" in str(errors[0])
    check(cluster.update("v1", method="direct"))
    assert all(torch.equal(cluster.recorders[0].loaded[name], tensor) for name, tensor in content.items())


def test_without_p2p_auto_takes_broadcast_and_says_why(
    hosts: Callable[..., Cluster], caplog: pytest.LogCaptureFixture
) -> None:
    cluster = hosts(("red", "blue"), share=False)
    cluster.register("v1", tensors_of(1))
    with caplog.at_level("INFO"):
        check(cluster.update("v1", method="auto"))
    assert [server.last_report and server.last_report.method for server in cluster.servers] == ["broadcast"] * 2
    assert "does not let others read its memory" in caplog.text
    errors = cluster.update("v1", method="direct")
    assert "ranks 0 and 1 are on different hosts" in str(errors[0])


ranges = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=6).map(tuple)


@pytest.mark.pure
@given(st.lists(st.one_of(st.none(), ranges), min_size=1, max_size=3))
def test_what_any_worker_wants_is_fetched_once(wanted: list[Wanted]) -> None:
    (united,) = unite([(each,) for each in wanted])
    if any(each is None for each in wanted):
        assert united is None
        return
    assert united is not None
    bytes_of = [
        {at for start, nbytes in each or () for at in range(start, start + nbytes)} for each in (*wanted, united)
    ]
    assert set().union(*bytes_of[:-1]) == bytes_of[-1]
    assert sum(nbytes for _, nbytes in united) == len(bytes_of[-1])


@given(hosts=st.integers(2, 5), places=st.integers(1, 4), rounds=st.integers(1, 3))
def test_ranks_that_read_at_once_ask_different_ones(hosts: int, places: int, rounds: int) -> None:
    ranks = hosts * places
    names = [f"host{rank // places}" for rank in range(ranks)]
    plan = BucketPlan(
        256, tuple(Bucket(rank, 0, 256 * turn, 256, ()) for turn in range(rounds) for rank in range(ranks))
    )
    orders = [direct.in_turn(plan, rank, names) for rank in range(ranks)]
    for rank, order in enumerate(orders):
        assert sorted(order) == [
            index for index, bucket in enumerate(plan.buckets) if names[bucket.owner] != names[rank]
        ]
    for asked in zip(*orders, strict=True):
        assert len({plan.buckets[index].owner for index in asked}) == ranks
        assert len({plan.buckets[index].start for index in asked}) == 1, "shards of one tensor come together"
