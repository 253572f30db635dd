"""A step through host memory: what is filled is sent while the rest is still on its way."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.catalog import TensorEntry
from checkpoint_engine.errors import (
    CheckpointEngineError,
    CheckpointFormatError,
    CheckpointStateError,
    DuplicateTensorError,
    UnsupportedTensorError,
    UpdateError,
)
from checkpoint_engine.receiver.reception import receive_update
from checkpoint_engine.reference.checkpoint import make_checkpoint
from checkpoint_engine.reference.engine import ReferenceEngine
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source import copying, filling, refill
from checkpoint_engine.source.filling import FillPiece
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.shards import NamedTensors, TensorShard
from checkpoint_engine.transfer.methods import Method
from tests.core.cluster import TIMEOUT, Cluster, Recorder, check
from tests.core.filling_rank import FillingRank
from tests.core.test_device_memory import assert_holds, train
from tests.core.test_shards import DEALINGS, SPEC, dealt, tensors_of, workers
from tests.ports import free_port

COUNT = 12


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(4 / (1 << 20)))  # 4 KiB: a tensor
    monkeypatch.setattr(copying, "_CHUNK", 4096)
    monkeypatch.setattr(filling, "_CHUNK", 4096)


def weights() -> dict[str, torch.Tensor]:
    """None of them in memory that others could map."""
    return {f"layer.{i}.weight": torch.zeros(32, 32, dtype=torch.float32) for i in range(COUNT)}


def publish(cluster: Cluster, tensors: Mapping[str, torch.Tensor], version: str, method: Method = "direct") -> None:
    size = len(cluster.servers)
    shares = [dict(list(tensors.items())[rank::size]) for rank in range(size)]
    cluster.publish(shares, version, method, in_place=False)


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Has something be called before each piece of a refill, with its number."""

    def hold(before: Callable[[int], None]) -> None:
        def late(number: int, piece: FillPiece) -> FillPiece:
            return FillPiece(piece.start, piece.end, lambda: (before(number), piece.run())[1], piece.from_device)

        def all_late(pieces: Callable[..., Iterable[FillPiece]], *arguments: Any) -> list[FillPiece]:
            return [late(number, piece) for number, piece in enumerate(pieces(*arguments))]

        for name, pieces in (("pieces_into", copying.pieces_into), ("pieces_of_files", filling.pieces_of_files)):
            monkeypatch.setattr(refill, name, partial(all_late, pieces))

    return hold


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", ["direct", "broadcast", "auto"])
@pytest.mark.parametrize("from_device", [False, True])
def test_every_step_arrives_whole_however_late_its_bytes_come(
    held_back: Callable[[Callable[[int], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    method: Method,
    *,
    from_device: bool,
) -> None:
    monkeypatch.setattr(copying, "comes_from_a_device", lambda _: from_device)  # the host downloads from itself
    monkeypatch.setattr(copying, "_DOWNLOAD", 4096)
    held_back(lambda number: time.sleep(0.002 * (number % 3)))
    cluster, tensors = Cluster(size), weights()
    for step in range(4):
        expected = train(tensors, step)
        publish(cluster, tensors, f"step-{step}", method)
        assert_holds(cluster, expected)
    cluster.close()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", ["direct", "broadcast", "auto"])
def test_the_first_tensors_are_loaded_before_the_last_ones_have_come(
    held_back: Callable[[Callable[[int], None]], None], method: Method, size: int
) -> None:
    """By the workers of all ranks, before any rank has its last ones."""
    cluster, tensors = Cluster(size), weights()
    publish(cluster, tensors, "step-0", method)
    loaded = [threading.Event() for _ in range(size)]
    for recorder, event in zip(cluster.recorders, loaded, strict=True):
        recorder.on_load = event.set

    def before(number: int) -> None:
        if number == COUNT // size - 1 and not all(event.wait(TIMEOUT / 2) for event in loaded):
            raise CheckpointEngineError("nothing was loaded before the last piece")

    held_back(before)
    expected = train(tensors, 1)
    publish(cluster, tensors, "step-1", method)
    assert_holds(cluster, expected)
    cluster.close()


def files_of(tensors: Mapping[str, torch.Tensor], directory: Path, size: int) -> list[list[Path]]:
    """For each rank one, with what is its; written anew, as trainers do, or over what was there before."""
    directory.mkdir(exist_ok=True)
    shares = [[directory / f"{rank}.safetensors"] for rank in range(size)]
    for rank, (path,) in enumerate(shares):
        save_file(dict(list(tensors.items())[rank::size]), path)
    return shares


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", ["direct", "broadcast", "auto"])
def test_a_file_is_sent_while_it_is_read(
    held_back: Callable[[Callable[[int], None]], None], tmp_path: Path, method: Method, size: int
) -> None:
    cluster, tensors = Cluster(size), weights()
    loaded = [threading.Event() for _ in range(size)]
    held: list[int] = []

    def before(number: int) -> None:
        if number == COUNT // size - 1:
            held.append(number)
            check([] if all(event.wait(TIMEOUT / 2) for event in loaded) else [CheckpointEngineError("too late")])

    for recorder, event in zip(cluster.recorders, loaded, strict=True):
        recorder.on_load = event.set
    for step in range(3):
        for event in loaded:
            event.clear()
        expected = train(tensors, step)
        cluster.publish_files(files_of(tensors, tmp_path / str(step), size), f"step-{step}", method)
        assert_holds(cluster, expected)
        held_back(before)
    assert len(held) == 2 * size
    cluster.close()


def test_a_file_that_is_written_to_while_it_is_read_fails_the_step_and_the_next_one_heals(
    held_back: Callable[[Callable[[int], None]], None], tmp_path: Path
) -> None:
    cluster, tensors = Cluster(1), weights()
    cluster.publish_files(files_of(tensors, tmp_path, 1), "step-0")
    expected = train(tensors, 1)
    ((file,),) = files = files_of(tensors, tmp_path, 1)

    def write(number: int) -> None:
        if number == COUNT - 1:
            file.write_bytes(file.read_bytes()[:-4])

    held_back(write)
    with pytest.raises(UpdateError, match=rf"'step-1' failed in phase 'load': {file} "):
        cluster.publish_files(files, "step-1")
    held_back(lambda _: None)
    cluster.publish_files(files_of(tensors, tmp_path, 1), "step-2")
    assert_holds(cluster, expected)
    cluster.close()


@pytest.mark.parametrize("checksum", ["", "1"])
def test_files_of_every_kind_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: str) -> None:
    """On a disk or in memory, whole or broken, of other shapes, beside tensors."""
    if checksum:
        monkeypatch.setenv("CHECKPOINT_ENGINE_CHECKSUM", checksum)
    cluster, tensors = Cluster(1), weights()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for step, directory in enumerate([tmp_path, Path(memory), Path(memory), tmp_path, tmp_path]):
            expected = train(tensors, step)
            cluster.publish_files(files_of(tensors, directory / str(step), 1), f"step-{step}", "auto")
            assert_holds(cluster, expected)
        ((broken,),) = files_of(tensors, tmp_path / "broken", 1)
        broken.write_bytes(broken.read_bytes()[:-4])
        with pytest.raises(CheckpointFormatError, match=str(broken)):
            cluster.publish_files([[broken]], "broken")
        other = {"of another shape": torch.ones(5), **dict(list(tensors.items())[1:])}
        (files,) = files_of(other, tmp_path, 1)
        cluster.publish_files([files], "other")
        assert_holds(cluster, other)
        beside = {"beside": torch.arange(7)}
        for step in range(2):
            beside["beside"] += 1
            (server,) = cluster.servers
            server.publish(beside, cluster.asker(0), files=files, version=f"both-{step}", in_place=False)
            assert_holds(cluster, other | beside)
            assert all((tensor.checksum is not None) is bool(checksum) for tensor in server.catalog().tensors())
    cluster.close()


@pytest.mark.parametrize("method", ["direct", "broadcast"])
def test_shards_and_copies_are_loaded_before_the_last_ones_have_come(
    held_back: Callable[[Callable[[int], None]], None], method: Method
) -> None:
    """Each rank has half of every tensor, as FSDP deals them out, and all of the norm."""
    cluster, tensors = Cluster(2), weights() | {"norm": torch.zeros(33)}

    def shares() -> list[NamedTensors]:
        return [
            {
                name: tensor if name == "norm" else TensorShard(tensor[16 * rank :][:16], (32, 32), (16 * rank, 0))
                for name, tensor in tensors.items()
            }
            for rank in range(2)
        ]

    cluster.publish(shares(), "step-0", method, in_place=False)
    loaded = [threading.Event() for _ in range(2)]
    for recorder, event in zip(cluster.recorders, loaded, strict=True):
        recorder.on_load = event.set
    held: list[int] = []

    def before(number: int) -> None:
        if number == COUNT // 2:
            held.append(number)
            check([] if all(event.wait(TIMEOUT / 2) for event in loaded) else [CheckpointEngineError("too late")])

    held_back(before)
    for step in (1, 2):
        for event in loaded:
            event.clear()
        expected = train(tensors, step)
        cluster.publish(shares(), f"step-{step}", method, in_place=False)
        assert_holds(cluster, expected)
    assert len(held) == 4  # of both ranks, in both steps
    cluster.close()


def test_copies_that_differ_are_refused() -> None:
    cluster, norms = Cluster(2), [torch.zeros(33), torch.zeros(33)]
    shares: list[NamedTensors] = [{"norm": norms[rank], f"own.{rank}": torch.ones(3)} for rank in range(2)]
    cluster.publish(shares, "step-0", "direct", in_place=False)
    norms[1][7] = 1
    for error in cluster.try_to_publish(shares, "step-1", "direct", in_place=False):
        assert isinstance(error, DuplicateTensorError)
    norms[0][7] = 1
    cluster.publish(shares, "step-2", "direct", in_place=False)
    assert all(torch.equal(recorder.loaded["norm"], norms[0]) for recorder in cluster.recorders)
    cluster.close()


@pytest.mark.parametrize("method", ["direct", "broadcast", "auto"])
def test_no_worker_reads_another_ranks_memory_too_early(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """One rank has its bytes at once, the other has them late."""
    cluster, tensors = Cluster(2), weights()
    publish(cluster, tensors, "step-0", method)
    late: list[Segment] = []

    def pieces(segment: Segment, *arguments: Any) -> list[FillPiece]:
        found = list(copying.pieces_into(segment, *arguments))
        late.append(segment)
        if segment is late[0]:
            return found
        slow = [lambda run=piece.run: (time.sleep(0.05), run())[1] for piece in found]
        return [FillPiece(p.start, p.end, run, p.from_device) for p, run in zip(found, slow, strict=True)]

    monkeypatch.setattr(refill, "pieces_into", pieces)
    for step in range(1, 4):
        late.clear()
        expected = train(tensors, step)
        publish(cluster, tensors, f"step-{step}", method)
        assert_holds(cluster, expected)
    cluster.close()


@pytest.mark.parametrize("method", ["direct", "broadcast"])
@pytest.mark.parametrize("dealing", ["whole", "rows"])
def test_parallel_engines_hold_what_a_cold_start_does_however_late_its_bytes_come(
    held_back: Callable[[Callable[[int], None]], None], tmp_path: Path, dealing: str, method: Method
) -> None:
    cluster = Cluster(2)
    sinks = workers(cluster)
    held_back(lambda number: time.sleep(0.005 * (number % 5)))
    for seed in (1, 2, 3, 4):
        directory = make_checkpoint(tmp_path / str(seed), SPEC, seed=seed)
        tensors = tensors_of(directory)
        whole = [dict(list(tensors.items())[rank::2]) for rank in range(2)]
        shares = whole if dealing == "whole" else dealt(tensors, DEALINGS[dealing], 2)
        cluster.publish(shares, f"step-{seed}", method, in_place=False)
        for rank, sink in enumerate(sinks):
            assert sink.engine.compare(ReferenceEngine.cold_start(directory, tp_rank=rank, tp_size=2)).equal
    report = cluster.servers[0].last_report
    assert report is not None
    assert report.engine["reload"] == "plan"
    cluster.close()


def test_bytes_that_do_not_come_fail_the_step_and_the_next_one_heals(
    held_back: Callable[[Callable[[int], None]], None],
) -> None:
    cluster, tensors = Cluster(1), weights()
    publish(cluster, tensors, "step-0")
    train(tensors, 1)
    held_back(lambda number: check([CheckpointEngineError("the driver refuses")] if number == COUNT // 2 else []))
    with pytest.raises(UpdateError, match="'step-1' failed in phase 'load': the driver refuses"):
        publish(cluster, tensors, "step-1")
    with pytest.raises(CheckpointEngineError, match="driver refuses"):  # what is half there is never sent
        cluster.servers[0].update("published", cluster.asker(0), timeout=timedelta(seconds=TIMEOUT))
    held_back(lambda _: None)
    expected = train(tensors, 2)
    publish(cluster, tensors, "step-2")
    assert_holds(cluster, expected)
    cluster.close()


@pytest.fixture
def held_back_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something be called before each piece but the first of the rank whose tensors have so many rows."""

    def hold(rows: int, before: Callable[[], None]) -> None:
        def pieces(segment: Segment, tensors: Sequence[TensorEntry], *rest: Any) -> list[FillPiece]:
            def late(piece: FillPiece) -> FillPiece:
                return FillPiece(piece.start, piece.end, lambda: (before(), piece.run())[1], piece.from_device)

            first, *others = copying.pieces_into(segment, tensors, *rest)
            return [first, *(map(late, others) if tensors[0].shape[0] == rows else others)]

        monkeypatch.setattr(refill, "pieces_into", pieces)

    return hold


def weights_of_two() -> dict[str, torch.Tensor]:
    """One rank's are of 32 rows, the other's of 16."""
    return {f"layer.{i}.weight": torch.zeros((32, 32) if i % 2 else (16, 64)) for i in range(COUNT)}


@pytest.mark.parametrize("method", ["direct", "broadcast", "auto"])
def test_a_rank_whose_bytes_do_not_come_is_named_by_all_at_once(
    held_back_on: Callable[[int, Callable[[], None]], None], method: Method
) -> None:
    cluster, tensors = Cluster(2), weights_of_two()
    publish(cluster, tensors, "step-0", method)
    train(tensors, 1)
    held_back_on(32, lambda: check([CheckpointEngineError("the driver refuses")]))
    start = time.monotonic()
    shares = [dict(list(tensors.items())[rank::2]) for rank in range(2)]
    errors = cluster.try_to_publish(shares, "step-1", method)
    assert time.monotonic() - start < TIMEOUT / 4
    for error in errors:
        assert isinstance(error, UpdateError)
        assert "'step-1' failed on rank 1 in phase 'load': the driver refuses" in str(error)
    held_back_on(0, lambda: None)
    expected = train(tensors, 2)
    publish(cluster, tensors, "step-2", method)
    assert_holds(cluster, expected)
    cluster.close()


@pytest.mark.parametrize("signal", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.long)])
def test_a_rank_that_ends_or_stands_still_while_it_fills_is_named(signal: str) -> None:
    port, recorder = free_port(), Recorder()
    tensors = {f"of.rank.0.{i}": torch.zeros(1024) for i in range(COUNT)}
    with (
        FillingRank(port, COUNT, 1024) as other,
        ParameterServer(rank=0, world_size=2, master_addr="127.0.0.1", master_port=port, device="cpu") as server,
    ):

        def step(number: int) -> None:
            server.publish(
                tensors,
                lambda handles: check([receive_update(handles[0][1], recorder, server.device, timeout=TIMEOUT)]),
                version=f"step-{number}",
                method="direct",
                in_place=False,
                timeout=timedelta(seconds=TIMEOUT),
            )

        def end_it() -> None:
            if "of.rank.1.0" in recorder.loaded:
                other.signal(signal)

        step(0)
        recorder.on_load = end_it
        start = time.monotonic()
        with pytest.raises(UpdateError, match=r"'step-1' failed on rank 1 .*: rank 1 "):
            step(1)
        assert time.monotonic() - start < TIMEOUT / 2
        assert other.hear() == "filling"
        assert [name for name in recorder.loaded if "rank.1" in name] == ["of.rank.1.0"]


def test_a_step_that_failed_leaves_the_trainers_tensors_alone(
    held_back: Callable[[Callable[[int], None]], None],
) -> None:
    cluster, tensors = Cluster(1), weights()
    publish(cluster, tensors, "step-0")
    begun: list[int] = []
    held_back(lambda number: (begun.append(number), time.sleep(0.05))[1])
    cluster.recorders[0].fail_in = "begin"
    with pytest.raises(UpdateError, match="told to fail in begin"):
        publish(cluster, tensors, "step-1")
    read = len(begun)
    time.sleep(0.2)
    assert len(begun) == read < COUNT
    cluster.recorders[0].fail_in = ""
    with pytest.raises(UpdateError, match="was given up; register it again"):
        cluster.servers[0].update("published", cluster.asker(0), timeout=timedelta(seconds=TIMEOUT))
    expected = train(tensors, 2)
    publish(cluster, tensors, "step-2")
    assert_holds(cluster, expected)
    cluster.close()


def test_another_shape_is_registered_anew(held_back: Callable[[Callable[[int], None]], None]) -> None:
    cluster, tensors = Cluster(1), weights()
    publish(cluster, tensors, "step-0")
    tensors["layer.3.weight"] = torch.zeros(16, 16)
    expected = train(tensors, 1)
    publish(cluster, tensors, "step-1")
    assert_holds(cluster, expected)
    cluster.close()


def test_tensors_that_were_freed_since_are_refused_before_a_byte_is_read() -> None:
    cluster, tensors = Cluster(1), weights()
    for step in range(2):
        publish(cluster, tensors, f"step-{step}")
    held = dict(cluster.recorders[0].loaded)
    tensors["layer.3.weight"].untyped_storage().resize_(0)
    with pytest.raises(UnsupportedTensorError, match=r"'layer.3.weight' has no plain data: .* it was freed"):
        publish(cluster, tensors, "step-2")
    assert_holds(cluster, held)
    tensors["layer.3.weight"] = torch.zeros(32, 32)
    expected = train(tensors, 3)
    publish(cluster, tensors, "step-3")
    assert_holds(cluster, expected)
    cluster.close()


def test_what_is_being_sent_takes_no_new_bytes() -> None:
    cluster, tensors = Cluster(1), weights()
    publish(cluster, tensors, "step-0")
    store = cluster.servers[0]._store
    with (
        store.use("published"),
        pytest.raises(CheckpointStateError, match="'published' is being sent"),
    ):
        store.refresh("published", tensors, tensors_stay=False, at_once=True, farewell=lambda _name, *, stays: None)
    cluster.close()


def test_a_closed_server_writes_nothing_more(held_back: Callable[[Callable[[int], None]], None]) -> None:
    cluster, tensors = Cluster(1), weights()
    publish(cluster, tensors, "step-0")
    written: list[int] = []
    held_back(lambda number: (time.sleep(0.02), written.append(number))[1])
    store = cluster.servers[0]._store
    store.refresh("published", tensors, tensors_stay=False, at_once=True, farewell=lambda _name, *, stays: None)
    assert isinstance(store.get("published").segments[0], Segment)
    cluster.close()
    done = len(written)
    time.sleep(0.1)
    assert len(written) == done < COUNT
