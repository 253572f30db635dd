"""Updates that read other ranks' host memory: a part of a group, and groups that join from the metas of others."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.errors import CheckpointStateError, SettingError, UpdateError
from checkpoint_engine.planning.peers import PeerPlan, plan_peer_reads
from checkpoint_engine.planning.receivers import Port
from checkpoint_engine.transfer.trace import Span, covered
from tests.core.cluster import TIMEOUT, Cluster, check
from tests.core.p2p_help import needs_mooncake

pytestmark = pytest.mark.usefixtures("p2p_environment")

Clusters = Callable[[int], Cluster]


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {f"layer.{i}.weight": noise(17 + i, 311).to(torch.bfloat16) for i in range(40)}
    return tensors | {
        "odd.bytes": (noise(777) * 9).to(torch.uint8),
        "after.odd": noise(3).double(),
        "zero.size": torch.empty(0, 7),
        "scalar": torch.tensor(3.5 + seed),
        "larger.than.a.bucket": noise(300, 301),
    }


def assert_delivered(cluster: Cluster, ranks: range, tensors: dict[str, torch.Tensor]) -> None:
    for rank in ranks:
        loaded = cluster.recorders[rank].loaded
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))


def join(cluster: Cluster, catalogs: list[Catalog], name: str, **options: bool) -> list[BaseException | None]:
    for server in cluster.servers:
        server.load_catalogs(catalogs)
    return cluster.on_all(
        lambda server: server.update(name, cluster.asker(server.rank), timeout=timedelta(seconds=TIMEOUT), **options)
    )


def catalog(cluster: Cluster, name: str) -> Catalog:
    """As it travels: through JSON."""
    return Catalog.from_json(cluster.servers[0].catalog(name).to_json())


@needs_mooncake
@pytest.mark.usefixtures("unshared")
@pytest.mark.parametrize("receivers", [[1], [0, 2], [2, 1]])
def test_some_ranks_are_updated_from_the_host_memory_of_all(clusters: Clusters, receivers: list[int]) -> None:
    group = clusters(3)
    for round_, name in enumerate("ab"):
        tensors = tensors_of(round_)
        group.register(name, tensors)
        check(
            group.on_all(
                lambda s, name=name: s.update(
                    name, group.asker(s.rank), ranks=receivers, timeout=timedelta(seconds=TIMEOUT)
                )
            )
        )
        for rank in range(3):
            if rank in receivers:
                assert_delivered(group, range(rank, rank + 1), tensors)
            else:
                assert not group.recorders[rank].loaded
        report = group.servers[receivers[0]].last_report
        assert report is not None
        assert report.method == "p2p"
        assert report.seconds["fetch"] > 0
    # All of them by broadcast afterwards: communicators of a part are not those of the whole.
    check(group.update("a"))
    assert_delivered(group, range(3), tensors_of(0))


@needs_mooncake
def test_what_is_shared_with_others_is_read_by_these_ranks_too(clusters: Clusters) -> None:
    group, tensors = clusters(2), tensors_of(0)
    group.register("a", tensors)
    check(group.on_all(lambda s: s.update("a", group.asker(s.rank), ranks=[1], timeout=timedelta(seconds=TIMEOUT))))
    assert_delivered(group, range(1, 2), tensors)


@needs_mooncake
def test_a_loop_that_shares_its_memory_is_joined_after_every_step(clusters: Clusters) -> None:
    """Other bytes in the same places: those who join would be refused by what was said of the step before."""
    loop, joiner = clusters(2), clusters(1)
    for step in range(3):
        tensors = tensors_of(step)
        shares = [dict(list(tensors.items())[rank::2]) for rank in range(2)]
        loop.publish(shares, f"step-{step}", "direct", in_place=False)
        check(join(joiner, [catalog(loop, "published")], "published"))
        assert_delivered(joiner, range(1), tensors)


@needs_mooncake
@pytest.mark.usefixtures("unshared")
def test_whatever_is_best_for_some_ranks_is_p2p(clusters: Clusters) -> None:
    """A direct update would copy by a plan of reads, out of segments that this is no plan of."""
    group, tensors = clusters(2), tensors_of(0)
    group.register("a", tensors)
    check(
        group.on_all(
            lambda s: s.update("a", group.asker(s.rank), ranks=[1], method="auto", timeout=timedelta(seconds=TIMEOUT))
        )
    )
    assert_delivered(group, range(1, 2), tensors)
    report = group.servers[1].last_report
    assert report is not None
    assert report.method == "p2p"


@needs_mooncake
def test_a_trace_shows_when_buckets_were_read(clusters: Clusters) -> None:
    here, there = clusters(1), clusters(1)
    there.register("a", tensors_of(1))
    check(join(here, [catalog(there, "a")], "a", trace=True))
    report = here.servers[0].last_report
    assert report is not None
    assert report.trace is not None
    reads = [span for span in report.trace.spans if span.lane == "read"]
    assert sorted(span.bucket or 0 for span in reads) == list(range(report.buckets))
    assert report.seconds["fetch"] == covered(reads)


@pytest.mark.pure
def test_time_is_covered_once_however_many_spans_lie_on_it() -> None:
    spans = [Span("read", "", begin, end) for begin, end in ((3.0, 4.0), (0.0, 2.0), (1.0, 1.5), (1.0, 2.5))]
    assert covered(spans) == 3.5
    assert covered([]) == 0.0


@needs_mooncake
@pytest.mark.parametrize(("seeds", "joiners"), [(2, 1), (1, 3), (3, 2)])
def test_a_group_of_another_size_joins(clusters: Clusters, seeds: int, joiners: int) -> None:
    here, there = clusters(joiners), clusters(seeds)
    tensors = tensors_of(1)
    there.register("a", tensors)
    check(join(here, [catalog(there, "a")], "a"))
    assert_delivered(here, range(joiners), tensors)
    assert not there.recorders[0].loaded
    assert here.servers[0].checkpoints == []


@needs_mooncake
def test_metas_of_the_known_form_suffice(clusters: Clusters) -> None:
    """As existing join scripts do it: gather first, then load, then update with all ranks named."""
    here, there = clusters(2), clusters(1)
    tensors = tensors_of(1)
    there.register("a", tensors)
    adapter = TypeAdapter(dict[int, MemoryBufferMetaList])
    metas = adapter.validate_json(adapter.dump_json(there.servers[0].get_metas()))
    check(here.on_all(lambda s: s.gather_metas("new name")))
    for server in here.servers:
        server.load_metas(metas)
    check(here.on_all(lambda s: s.update("new name", here.asker(s.rank), ranks=[0, 1])))
    assert_delivered(here, range(2), tensors)
    assert here.recorders[0].update is not None
    assert here.recorders[0].update.version == "new name"
    for address, generation, expected in (
        (None, 1, "does not share its memory"),
        ("1.2.3.4:5", 0, "lack generation"),
    ):
        metas[0].p2p_store_addr, metas[0].generation = address, generation
        for server in here.servers:
            server.load_metas(metas)
        for failed in here.on_all(lambda s: s.update("x", here.asker(s.rank))):
            assert expected in str(failed)


@needs_mooncake
def test_two_seeds_are_read_side_by_side_whatever_their_layout(clusters: Clusters) -> None:
    here, one, two = clusters(2), clusters(2), clusters(3)
    tensors = tensors_of(1)
    one.register("a", tensors)
    two.register("a", dict(reversed(tensors.items())))
    catalogs = [catalog(one, "a"), catalog(two, "a")]
    assert catalogs[0].content == catalogs[1].content != ""
    check(join(here, catalogs, "a"))
    assert_delivered(here, range(2), tensors)


@needs_mooncake
def test_another_seed_takes_over_for_one_that_moved_on(clusters: Clusters) -> None:
    here, one, two = clusters(2), clusters(2), clusters(1)
    tensors = tensors_of(1)
    for there in (one, two):
        there.register("a", tensors)
    catalogs = [catalog(one, "a"), catalog(two, "a")]
    one.servers[1].unregister_checkpoint("a")
    check(join(here, catalogs, "a"))
    assert_delivered(here, range(2), tensors)
    two.servers[0].unregister_checkpoint("a")
    for error in join(here, catalogs, "a"):
        assert isinstance(error, UpdateError)
        assert "no longer holds what its metas say" in str(error)
        assert "tensor" in str(error)
        assert error.phase == "load"


@needs_mooncake
def test_a_joiner_becomes_a_seed(clusters: Clusters) -> None:
    first, second, third = clusters(1), clusters(2), clusters(3)
    tensors = tensors_of(1)
    first.register("a", tensors)
    check(join(second, [catalog(first, "a")], "a", keep=True))
    check(second.on_all(lambda s: s.gather_metas("a")))
    again = catalog(second, "a")
    assert again.fingerprint() == catalog(first, "a").fingerprint()
    assert again.content == catalog(first, "a").content
    first.servers[0].unregister_checkpoint("a")
    check(join(third, [again], "a"))
    assert_delivered(third, range(3), tensors)
    # What it holds is a checkpoint like any other.
    check(second.update("a"))
    assert_delivered(second, range(2), tensors)
    with pytest.raises(SettingError, match="keep"):
        second.servers[0].update("a", second.asker(0), keep=True)


@needs_mooncake
def test_seeds_of_different_versions_are_never_mixed(clusters: Clusters) -> None:
    here, one, two = clusters(1), clusters(1), clusters(1)
    one.register("a", tensors_of(1))
    two.register("a", tensors_of(2))
    with pytest.raises(CheckpointStateError, match="other values"):
        join(here, [catalog(one, "a"), catalog(two, "a")], "a")
    two.servers[0].register_checkpoint("b", named_tensors={"x": torch.ones(3)})
    check(two.on_all(lambda s: s.gather_metas("b")))
    with pytest.raises(CheckpointStateError, match="other tensors"):
        join(here, [catalog(one, "a"), catalog(two, "b")], "a")


@needs_mooncake
def test_seeds_that_do_not_share_say_how_they_would(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_P2P", "0")
    here, there = clusters(1), clusters(1)
    there.register("a", tensors_of(1))
    assert catalog(there, "a").holdings[0].p2p_address is None
    (error,) = join(here, [catalog(there, "a")], "a")
    assert isinstance(error, UpdateError)
    assert "CHECKPOINT_ENGINE_P2P=1" in str(error)


@needs_mooncake
def test_a_rank_that_cannot_take_part_is_named_by_all(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_P2P_STORE_RDMA_DEVICES", "mlx5_77")
    with pytest.raises(SettingError, match="'mlx5_77'"):
        clusters(1)
    monkeypatch.setenv("CHECKPOINT_ENGINE_P2P", "0")
    group = clusters(2)
    group.register("a", tensors_of(1))
    monkeypatch.delenv("PS_P2P_STORE_RDMA_DEVICES")
    group.servers[0]._sharing.store()  # rank 0 is on a host of its own, so to say, where the setting is right
    monkeypatch.setenv("PS_P2P_STORE_RDMA_DEVICES", "mlx5_77")
    started = time.monotonic()
    for error in group.on_all(lambda s: s.update("a", group.asker(s.rank), ranks=[0])):
        assert isinstance(error, UpdateError)
        assert error.rank == 1
        assert "'mlx5_77'" in str(error)
    assert time.monotonic() - started < TIMEOUT / 2


# -- the plan alone -------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Catalog], dict[str, bytes], dict[tuple[int, int], bytes]]:
    """Catalogs that hold the same tensors, the tensors' bytes, and the bytes of every segment of every holder."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=15))
    contents = {f"t{i}": bytes((i * 31 + k) % 251 for k in range(size)) for i, size in enumerate(sizes)}
    catalogs: list[Catalog] = []
    memory: dict[tuple[int, int], bytes] = {}
    holders = 0
    for number in range(draw(st.integers(1, 3))):
        names = draw(st.permutations(sorted(contents)))
        ranks = draw(st.integers(1, 3))
        holdings: list[Holding] = []
        for rank in range(ranks):
            segment, entries = bytearray(b"\xee" * draw(st.integers(0, 9))), []
            for name in names[rank::ranks]:
                entries.append(TensorEntry(name, "uint8", (len(contents[name]),), len(segment)))
                segment += contents[name] + b"\xee" * draw(st.integers(0, 3))
            memory[holders, 0] = bytes(segment)
            holders += 1
            holdings.append(Holding(rank, f"h{number}", "d", (SegmentEntry(len(segment), tuple(entries)),)))
        catalogs.append(Catalog("a", tuple(holdings)).validate())
    return catalogs, contents, memory


@pytest.mark.pure
@given(layouts(), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_route_brings_the_same_tensors(
    problem: tuple[list[Catalog], dict[str, bytes], dict[tuple[int, int], bytes]], receivers: int, size: int
) -> None:
    catalogs, contents, memory = problem
    plan = plan_peer_reads(catalogs, size * 16, [Port(f"r{i}") for i in range(receivers)])
    seen: list[str] = []
    for bucket, routes in zip(plan.plan.buckets, plan.routes, strict=True):
        assert 0 <= bucket.owner < receivers
        assert len(routes) == len(catalogs)
        seen += [tensor.name for tensor in bucket.tensors]
        for route in routes:
            target = bytearray(bucket.nbytes)
            for piece in route:
                source = memory[piece.holder, piece.segment]
                assert 0 <= piece.start <= piece.start + piece.nbytes <= len(source)
                assert 0 <= piece.at <= piece.at + piece.nbytes <= bucket.nbytes
                target[piece.at : piece.at + piece.nbytes] = source[piece.start : piece.start + piece.nbytes]
            for tensor in bucket.tensors:
                start = tensor.offset - bucket.start
                assert target[start : start + tensor.nbytes] == contents[tensor.name]
    assert sorted(seen) == sorted(contents)
    assert isinstance(plan, PeerPlan)
