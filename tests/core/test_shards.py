"""Checkpoints in shards: as trainers cut their tensors, into engines that cut them otherwise; nobody gathers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import (
    CheckpointFormatError,
    CheckpointStateError,
    DuplicateTensorError,
    UnsupportedTensorError,
    UpdateError,
)
from checkpoint_engine.receiver.pulling import Pull
from checkpoint_engine.reference.checkpoint import make_checkpoint
from checkpoint_engine.reference.engine import ModelSpec, ReferenceEngine
from checkpoint_engine.reference.sink import ReferenceSink
from checkpoint_engine.source.shards import NamedTensors, TensorShard
from tests.core.cluster import Cluster, check
from tests.core.p2p_help import needs_mooncake

SPEC = ModelSpec(experts=4)
Dealing = Callable[[str, torch.Tensor, int, int], "torch.Tensor | TensorShard | list[TensorShard] | None"]
"""What rank r of n has of a tensor; None for nothing."""


def rows(tensor: torch.Tensor, begin: int, end: int, dimension: int = 0) -> TensorShard:
    part = tensor.narrow(dimension, begin, end - begin)
    offsets = [0] * tensor.dim()
    offsets[dimension] = begin
    return TensorShard(shared(part), tuple(tensor.shape), offsets)


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that other processes can map, as memory of a GPU can be."""
    return tensor.contiguous().clone().share_memory_()


def chunked(dimension: int) -> Dealing:
    """As `Shard(dimension)` deals it out; what has no such dimension is replicated."""

    def deal(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor | TensorShard | None:
        del name
        if tensor.dim() <= dimension or tensor.dim() == 1:
            return shared(tensor)
        step = -(-tensor.shape[dimension] // size)
        begin, end = (min(tensor.shape[dimension], n * step) for n in (rank, rank + 1))
        return rows(tensor, begin, end, dimension) if begin < end else None

    return deal


def uneven(name: str, tensor: torch.Tensor, rank: int, size: int) -> TensorShard | None:
    """Nearly everything on the last rank, and single rows on the others."""
    del name
    if tensor.dim() == 0 or tensor.shape[0] < size:
        return TensorShard(shared(tensor), tuple(tensor.shape), (0,) * tensor.dim()) if rank == 0 else None
    return rows(tensor, rank, rank + 1 if rank < size - 1 else tensor.shape[0])


def by_experts(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor | TensorShard | None:
    """Experts whole on one rank each, all else cut by rows."""
    if ".experts." in name:
        expert = name.partition(".experts.")[2].partition(".")[0]
        return shared(tensor) if int(expert) % size == rank else None
    return chunked(0)(name, tensor, rank, size)  # type: ignore[return-value]


def grid(name: str, tensor: torch.Tensor, rank: int, size: int) -> list[TensorShard] | torch.Tensor | None:
    """Several boxes on each rank, in both dimensions, like a chessboard's."""
    del name
    if tensor.dim() != 2:
        return shared(tensor) if rank == 0 else None
    found: list[TensorShard] = []
    for row in range(2):
        half = tensor.shape[0] // 2
        begin, end = (0, half) if row == 0 else (half, tensor.shape[0])
        width = -(-tensor.shape[1] // size)
        left = (rank + row) % size * width
        part = tensor[begin:end, left : left + width]
        if part.numel():
            found.append(TensorShard(shared(part), tuple(tensor.shape), (begin, left)))
    return found or None


DEALINGS = {"rows": chunked(0), "columns": chunked(1), "uneven": uneven, "experts": by_experts, "grid": grid}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def dealt(tensors: Mapping[str, torch.Tensor], deal: Dealing, size: int) -> list[NamedTensors]:
    def part(name: str, tensor: torch.Tensor, rank: int) -> object:
        if not tensor.numel():
            return tensor if rank == 0 else None
        return deal(name, tensor, rank, size)

    found = [{name: part(name, tensor, rank) for name, tensor in tensors.items()} for rank in range(size)]
    return [{name: held for name, held in each.items() if held is not None} for each in found]


def workers(cluster: Cluster) -> list[ReferenceSink]:
    """Tensor-parallel workers in place of recorders."""
    size = len(cluster.servers)
    sinks = [ReferenceSink(ReferenceEngine(SPEC, tp_rank=rank, tp_size=size)) for rank in range(size)]
    cluster.recorders[:] = sinks  # type: ignore[assignment]
    return sinks


@pytest.mark.parametrize("way", ["broadcast", "direct", "in place"])
@pytest.mark.parametrize("dealing", DEALINGS)
def test_every_update_is_what_a_cold_start_holds(
    dealing: str, way: str, clusters: Callable[[int], Cluster], tmp_path: Path, set_bucket_size: Callable[[int], None]
) -> None:
    set_bucket_size(16 << 10)
    cluster = clusters(2)
    sinks, ways = workers(cluster), []
    for seed in (1, 2, 3, 1):
        directory = make_checkpoint(tmp_path / str(seed), SPEC, seed=seed)
        shares = dealt(tensors_of(directory), DEALINGS[dealing], 2)
        cluster.publish(shares, f"v{seed}", way.replace("in place", "direct"), in_place=way == "in place")
        for rank, sink in enumerate(sinks):
            cold = ReferenceEngine.cold_start(directory, tp_rank=rank, tp_size=2)
            assert sink.engine.compare(cold).equal
            assert sink.version == f"v{seed}"
        report = cluster.servers[0].last_report
        assert report is not None
        assert report.tensors == len(tensors_of(directory))
        ways.append(report.engine["reload"])
    assert ways == ["proof", "plan", "plan", "plan"]


def test_three_ranks_and_the_loader_alone(
    clusters: Callable[[int], Cluster], tmp_path: Path, set_bucket_size: Callable[[int], None]
) -> None:
    set_bucket_size(8 << 10)
    cluster = clusters(3)
    tensors = tensors_of(make_checkpoint(tmp_path, SPEC, seed=1))
    for method in ("broadcast", "direct"):
        for deal in DEALINGS.values():
            cluster.publish(dealt(tensors, deal, 3), "v", method, in_place=False)
            for recorder in cluster.recorders:
                assert recorder.loaded.keys() == tensors.keys()
                assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors.items())


def test_a_worker_reads_what_it_keeps_and_nothing_else(clusters: Callable[[int], Cluster], tmp_path: Path) -> None:
    cluster = clusters(2)
    sinks = workers(cluster)
    directory = make_checkpoint(tmp_path, SPEC, seed=1)
    shares = dealt(tensors_of(directory), chunked(0), 2)
    for step in range(3):
        cluster.publish(shares, f"v{step}", "direct", in_place=True)
    kept = sum(p.nbytes for sink in sinks for p in sink.engine.parameters.values())
    padding = sum(
        sink.engine.parameters[slot.parameter][slot.zeros].nbytes
        for sink in sinks
        for slot in sink.engine.layout.slots.values()
        if slot.zeros is not None
    )
    reports = [server.last_report for server in cluster.servers]
    assert sum(report.figures.read_bytes for report in reports if report is not None) == kept - padding


def test_tensors_in_place_change_from_step_to_step(clusters: Callable[[int], Cluster], tmp_path: Path) -> None:
    cluster = clusters(2)
    sinks = workers(cluster)
    shares = dealt(tensors_of(make_checkpoint(tmp_path / "1", SPEC, seed=1)), chunked(0), 2)
    for seed in (1, 2, 3, 4):
        directory = make_checkpoint(tmp_path / str(seed), SPEC, seed=seed)
        for held, new in zip(shares, dealt(tensors_of(directory), chunked(0), 2), strict=True):
            for name, value in held.items():
                _plain(value).copy_(_plain(new[name]))
        cluster.publish(shares, f"v{seed}", "direct", in_place=True)
        for rank, sink in enumerate(sinks):
            assert sink.engine.compare(ReferenceEngine.cold_start(directory, tp_rank=rank, tp_size=2)).equal
    report = cluster.servers[0].last_report
    assert report is not None
    assert report.engine["reload"] == "plan"


def _plain(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor | TensorShard)
    return value.tensor if isinstance(value, TensorShard) else value


def test_copies_that_differ_are_named_with_both_ranks(pair: Cluster) -> None:
    norm = [torch.ones(5).share_memory_() for _ in range(2)]
    shares: list[NamedTensors] = [{"norm": norm[rank], f"own.{rank}": torch.ones(3)} for rank in range(2)]
    pair.publish(shares, "v1", "direct", in_place=True)
    assert all(torch.equal(recorder.loaded["norm"], norm[0]) for recorder in pair.recorders)
    norm[1][3] = 7
    results = pair.on_all(lambda server: server.publish(shares[server.rank], pair.asker(server.rank), version="v2"))
    for error in results:
        assert isinstance(error, DuplicateTensorError)
        assert "'norm' is registered on rank 0 and again on rank 1, with other bytes" in str(error)
    norm[0][3] = 7
    pair.publish(shares, "v3", "direct", in_place=True)


def test_a_hole_and_an_overlap_are_named(pair: Cluster) -> None:
    whole = torch.arange(12.0).view(6, 2)
    for ends, message in (((2, 3), r"no rank .* elements \[2:3, 0:2\]"), ((3, 2), r"rank 0 as .* rank 1 as")):
        shares: list[NamedTensors] = [{"w": rows(whole, 0, ends[0])}, {"w": rows(whole, ends[1], 6)}]
        for rank, server in enumerate(pair.servers):
            server.register_checkpoint("c", named_tensors=shares[rank])
        with pytest.raises((CheckpointFormatError, DuplicateTensorError), match=message):
            check(pair.on_all(lambda server: server.gather_metas("c")))
        for server in pair.servers:
            server.unregister_checkpoint("c")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TensorShard(torch.ones(2, 3), (4, 3), (3, 0)), r"a shard of shape \[2, 3\] at \[3, 0\] does not lie within"),
        (TensorShard(torch.ones(2), (4, 3), (3, 0)), "does not lie within"),
        ([torch.ones(2)], "give plain tensors, DTensors, or TensorShards"),
    ],
)
def test_a_shard_that_makes_no_sense_is_refused(pair: Cluster, value: object, message: str) -> None:
    with pytest.raises(UnsupportedTensorError, match=message):
        pair.servers[0].register_checkpoint("c", named_tensors={"w": value})  # type: ignore[dict-item]


def test_an_engine_that_refuses_a_whole_tensor_says_so(clusters: Callable[[int], Cluster]) -> None:
    cluster = clusters(2)
    workers(cluster)
    whole = torch.zeros(6, 2)
    with pytest.raises(UpdateError, match="the engine does not know tensor 'w'"):
        cluster.publish([{"w": rows(whole, 0, 3)}, {"w": rows(whole, 3, 6)}], "v", "direct", in_place=False)


@needs_mooncake
@pytest.mark.usefixtures("p2p_environment")
def test_some_ranks_and_newcomers_read_shards_out_of_others_memory(
    clusters: Callable[[int], Cluster], tmp_path: Path, set_bucket_size: Callable[[int], None]
) -> None:
    set_bucket_size(16 << 10)
    group, newcomers = clusters(2), clusters(2)
    tensors = tensors_of(make_checkpoint(tmp_path, SPEC, seed=1))
    for server, share in zip(group.servers, dealt(tensors, grid, 2), strict=True):
        server.register_checkpoint("c", named_tensors=share)
    check(group.on_all(lambda server: server.gather_metas("c")))
    check(group.on_all(lambda server: server.update("c", group.asker(server.rank), ranks=[1])))
    catalog = Catalog.from_json(group.servers[0].catalog("c").to_json())
    for server in newcomers.servers:
        server.load_catalogs([catalog])
    check(newcomers.on_all(lambda server: server.update("c", newcomers.asker(server.rank), keep=True)))
    for recorder in (group.recorders[1], *newcomers.recorders):
        assert recorder.loaded.keys() == tensors.keys()
        assert all(torch.equal(recorder.loaded[name], tensor) for name, tensor in tensors.items())
    check(newcomers.on_all(lambda server: server.gather_metas("c")))  # and serve it in turn
    assert newcomers.servers[0].catalog("c").fingerprint() == catalog.fingerprint()
    with pytest.raises(CheckpointStateError, match="is held in shards, and an engine starts from whole tensors only"):
        Pull([catalog])
    with pytest.raises(CheckpointStateError, match="which upstream's metas cannot say; pass on the catalog"):
        group.servers[0].get_metas()
