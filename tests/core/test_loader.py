from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedParameter

from checkpoint_engine.device import CpuDevice
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.errors import (
    CheckpointFormatError,
    DuplicateTensorError,
    HostMemoryError,
    SettingError,
    UnsupportedTensorError,
)
from checkpoint_engine.planning.buckets import ALIGNMENT
from checkpoint_engine.source import copying, filling
from checkpoint_engine.source.filling import Filled
from checkpoint_engine.source.loader import (
    iterate_files,
    load_files,
    load_tensors,
    select,
    split_among_ranks,
)
from checkpoint_engine.source.segment import Segment
from checkpoint_engine.source.store import CheckpointStore

pytestmark = pytest.mark.pure


def contents(filled: Sequence[Filled]) -> dict[str, torch.Tensor]:
    """Copies of all tensors, as they lie in the segments; also checks the catalog entries."""
    tensors: dict[str, torch.Tensor] = {}
    for part in filled:
        assert (part.entry.nbytes, part.entry.address) == (part.segment.nbytes, part.segment.address)
        end = 0
        for entry in part.entry.tensors:
            assert end <= entry.offset
            end = entry.offset + entry.nbytes
            data = part.segment.tensor[entry.offset : end].clone()
            tensors[entry.name] = data.view(torch_dtype(entry.dtype)).view(entry.shape)
        assert end <= part.segment.nbytes
    return tensors


needs_fp4 = pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no FP4")


@needs_fp4
def test_fp4_is_read_from_files_and_memory(tmp_path: Path) -> None:
    tensors = {"fp4": torch.arange(48, dtype=torch.uint8).view(4, 12).view(torch.float4_e2m1fn_x2)}
    save_file(tensors, tmp_path / "model.safetensors")
    for filled in (load_files([tmp_path / "model.safetensors"], in_place=False), load_tensors(tensors)):
        found = contents(filled)["fp4"]
        assert (found.dtype, found.shape) == (torch.float4_e2m1fn_x2, (4, 12))
        assert torch.equal(found.view(torch.uint8), tensors["fp4"].view(torch.uint8))
        free(filled)


@pytest.mark.parametrize("shape", [[], [3, 5]])
def test_fp4_whose_elements_do_not_come_in_pairs_is_refused(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointFormatError, match="come in pairs"):
        select([tmp_path / "a.safetensors"])


def free(filled: Sequence[Filled]) -> None:
    for part in filled:
        part.segment.close()


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected) or sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        ours, theirs = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs), name


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "embed": torch.randn(301, 33, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 7),
        "odd": torch.randint(0, 255, (12_345,), dtype=torch.uint8, generator=generator),
        "flags": torch.tensor([True, False, True]),
        "fp8": torch.randn(64, 3, generator=generator).to(torch.float8_e4m3fn),
        "wide": torch.randn(5, 7, 11, dtype=torch.float64, generator=generator),
    }


def write_shards(directory: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> list[Path]:
    names = list(tensors)
    paths = [directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    for shard, path in enumerate(paths):
        save_file({name: tensors[name] for name in names[shard::shards]}, path)
    return paths


def test_files_arrive_bit_for_bit_at_aligned_offsets(tmp_path: Path) -> None:
    filled = load_files(write_shards(tmp_path, model(), 3), in_place=False)
    assert_same(contents(filled), model())
    assert all(t.offset % ALIGNMENT == 0 for part in filled for t in part.entry.tensors)
    free(filled)


@pytest.mark.thorough
@pytest.mark.parametrize(("chunk", "target"), [(1000, 1 << 30), (64, 4096), (100, 1), (1 << 20, 10_000)])
@pytest.mark.parametrize("from_device", [False, True])
def test_small_chunks_and_segments_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, target: int, *, from_device: bool
) -> None:
    """Constants are made small so that chunks, gathered reads and segments all have many borders."""
    monkeypatch.setattr(filling, "_CHUNK", chunk)
    monkeypatch.setattr(copying, "_CHUNK", chunk)
    monkeypatch.setattr(copying, "_DOWNLOAD", chunk)
    monkeypatch.setattr(copying, "comes_from_a_device", lambda _: from_device)  # the host downloads from itself
    monkeypatch.setattr(filling, "SEGMENT_TARGET", target)
    monkeypatch.setattr(filling, "_MOST_PIECES", 2)
    tensors = model() | {f"small.{i}": torch.arange(i, dtype=torch.int16) for i in range(40)}
    for filled in (load_files(write_shards(tmp_path, tensors, 2), in_place=False), load_tensors(tensors)):
        assert_same(contents(filled), tensors)
        assert (len(filled) > 1) == (target <= 10_000)
        free(filled)


def test_many_small_tensors_beyond_one_gathered_read(tmp_path: Path) -> None:
    tensors = {f"t{i:05}": torch.full((i % 3 + 1,), i, dtype=torch.int32) for i in range(3000)}
    filled = load_files(write_shards(tmp_path, tensors, 1), in_place=False)
    assert_same(contents(filled), tensors)
    free(filled)


def test_reads_that_come_up_short_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may read less than was asked for, and stop in the middle of any piece."""
    read = os.preadv
    lengths: list[int] = []

    def read_little(descriptor: int, buffers: list[memoryview], position: int) -> int:
        room, some = 1 + len(lengths) % 700, list[memoryview]()
        for buffer in buffers:
            some.append(buffer[:room])
            room -= len(some[-1])
        lengths.append(read(descriptor, some, position))
        return lengths[-1]

    monkeypatch.setattr(os, "preadv", read_little)
    filled = load_files(write_shards(tmp_path, model(), 2), in_place=False)
    assert_same(contents(filled), model())
    assert len(lengths) > 50
    free(filled)


def test_only_the_named_tensors_are_read(tmp_path: Path) -> None:
    one, two = write_shards(tmp_path, model(), 2)
    filled = load_files({one: ("flags", "embed"), two: ()}, in_place=False)
    assert_same(contents(filled), {name: model()[name] for name in ("embed", "flags")})
    free(filled)


def test_a_name_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, model(), 1)
    with pytest.raises(CheckpointFormatError, match=rf"{path} lacks lm_head, norm"):
        load_files({path: ("embed", "norm", "lm_head")})


def test_the_same_tensor_in_two_files_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.source.copies_in_files._PIECE", 16)
    once = {"x": torch.arange(9.0), "empty": torch.zeros(0)}
    save_file(once, tmp_path / "a.safetensors")
    save_file({**once, "y": torch.ones(3)}, tmp_path / "b.safetensors")
    filled = load_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert_same(contents(filled), {**once, "y": torch.ones(3)})
    assert sum(len(part.entry.tensors) for part in filled) == 3
    free(filled)


@pytest.mark.parametrize(
    "other", [torch.arange(9.0) + (torch.arange(9) == 8), torch.arange(9.0).view(3, 3), torch.arange(9)]
)
def test_another_tensor_of_that_name_in_two_files_is_refused_with_both(tmp_path: Path, other: torch.Tensor) -> None:
    save_file({"x": torch.arange(9.0)}, tmp_path / "a.safetensors")
    save_file({"x": other}, tmp_path / "b.safetensors")
    with pytest.raises(DuplicateTensorError, match=r"'x' is in .*a\.safetensors and again in .*b\.safetensors"):
        load_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    with pytest.raises(DuplicateTensorError, match="given twice"):
        load_files([tmp_path / "a.safetensors", str(tmp_path / "a.safetensors")])


def test_nothing_is_nothing(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    assert load_files([]) == load_files([tmp_path / "empty.safetensors"]) == load_tensors({}) == []


@pytest.mark.parametrize("in_place", [True, False])
def test_only_zero_size_tensors(tmp_path: Path, on_tmpfs: Path, in_place: bool) -> None:
    tensors = {"a": torch.empty(0, 3), "b": torch.empty(2, 0, dtype=torch.int8)}
    for directory in (tmp_path, on_tmpfs):
        filled = load_files(write_shards(directory, tensors, 1), in_place=in_place)
        assert_same(contents(filled), tensors)
        free(filled)
    filled = load_tensors(tensors)
    assert_same(contents(filled), tensors)
    free(filled)


def test_files_on_tmpfs_are_used_in_place_and_stay(on_tmpfs: Path) -> None:
    paths = write_shards(on_tmpfs, model(), 2)
    filled = load_files(paths)
    assert [part.segment.file for part in filled] == paths
    assert_same(contents(filled), model())
    # Shared with the file: what is written there shows here.
    entry = next(t for t in filled[0].entry.tensors if t.name == "embed")
    with paths[0].open("r+b") as file:
        file.seek(filled[0].segment.file_start + entry.offset)
        file.write(b"\x55")
    assert filled[0].segment.tensor[entry.offset] == 0x55
    free(filled)
    assert all(path.exists() for path in paths)


def test_a_part_of_a_file_on_tmpfs_maps_only_its_pages(on_tmpfs: Path) -> None:
    tensors = {f"t{i}": torch.full((10_000,), i, dtype=torch.uint8) for i in range(20)}
    (path,) = write_shards(on_tmpfs, tensors, 1)
    filled = load_files({path: ("t7", "t8")})
    assert_same(contents(filled), {name: tensors[name] for name in ("t7", "t8")})
    assert 20_000 <= filled[0].segment.nbytes < 20_000 + 4096
    free(filled)


def test_wanted_tensors_far_apart_are_mapped_apart(on_tmpfs: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(5 << 20), "c": torch.ones(4)}
    (path,) = write_shards(on_tmpfs, tensors, 1)
    filled = load_files({path: ("a", "c")})
    assert_same(contents(filled), {name: tensors[name] for name in ("a", "c")})
    assert sum(part.segment.nbytes for part in filled) < 3 * 4096
    free(filled)


def test_files_on_tmpfs_are_copied_if_asked(on_tmpfs: Path) -> None:
    filled = load_files(write_shards(on_tmpfs, model(), 1), in_place=False)
    assert [part.segment.file for part in filled] == [None]
    free(filled)


def test_a_file_that_shrinks_between_header_and_reading_is_an_error(tmp_path: Path, on_tmpfs: Path) -> None:
    for directory in (tmp_path, on_tmpfs):
        (path,) = write_shards(directory, model(), 1)
        selections = select([path])
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(CheckpointFormatError, match=rf"{path} changed"):
            list(iterate_files(selections))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write_shards(tmp_path, model(), 1)
    touch = Segment.touch

    def shrink_then_touch(segment: Segment, start: int, end: int) -> None:
        os.truncate(path, 2000)
        touch(segment, start, end)

    monkeypatch.setattr(Segment, "touch", shrink_then_touch)
    with pytest.raises(CheckpointFormatError, match="was truncated to 2000 bytes while it was being read"):
        load_files([path], in_place=False)


@pytest.mark.parametrize("from_device", [False, True])
def test_tensors_of_any_layout_arrive_bit_for_bit(monkeypatch: pytest.MonkeyPatch, *, from_device: bool) -> None:
    # Stands in for tensors of a GPU: the host downloads from itself.
    monkeypatch.setattr(copying, "comes_from_a_device", lambda _: from_device)
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = model() | {
        "transposed": base.t(),
        "strided": base[::2, ::3],
        "broadcast": torch.tensor([1.0, 2.0]).expand(3, 2),
        "tied": base,
        "tied again": base,
        "part of shared storage": base[1:3],
        "parameter": torch.nn.Parameter(base.clone()),
        "parameter transposed": torch.nn.Parameter(base.clone()).t(),
        "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "scalar of a view": base[2, 3],
        "unaligned": torch.arange(100, dtype=torch.uint8)[1:].view(torch.uint8)[:97],
    }
    with torch.inference_mode():
        tensors["inference"] = torch.ones(3, 3).t()
    filled = load_tensors(tensors)
    assert_same(contents(filled), {name: tensor.resolve_conj().resolve_neg() for name, tensor in tensors.items()})
    assert not any(part.segment.tensor.requires_grad for part in filled)
    free(filled)


def test_a_copy_is_taken() -> None:
    tensor = torch.ones(1000)
    filled = load_tensors({"x": tensor})
    tensor.zero_()
    assert contents(filled)["x"].eq(1).all()
    free(filled)


@pytest.mark.gpu
def test_tensors_of_a_gpu_arrive_even_if_they_are_still_being_computed() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        factor = torch.full((4096, 4096), 1 / 4096, device="cuda")
        product = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            product = product @ factor
        filled = load_tensors({"x": product, "t": product.t()})
    assert_same(contents(filled), {"x": product, "t": product.t()})
    free(filled)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), "'x' has no plain data: .* on meta"),
        (torch.eye(3).to_sparse(), "'x' has no plain data: its layout is torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex128), "'x': tensors of torch.complex128 cannot be carried; known are"),
    ],
    ids=["meta", "sparse", "complex128"],
)
def test_a_tensor_that_cannot_be_carried_is_named(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(UnsupportedTensorError, match=message):
        load_tensors({"fine": torch.ones(1), "x": tensor})


def test_more_than_the_host_has_is_refused_before_anything_is_taken(tmp_path: Path) -> None:
    giant = torch.zeros(1, dtype=torch.uint8).expand(60 << 30)
    with pytest.raises(HostMemoryError, match=r"checkpoint of 1000 tensors needs 60000\.00 GiB of host memory, "):
        load_tensors({f"expert.{i}": giant for i in range(1000)})
    path = tmp_path / "sparse.safetensors"
    header = json.dumps(
        {
            f"expert.{i}": {"dtype": "U8", "shape": [60 << 30], "data_offsets": [i * (60 << 30), (i + 1) * (60 << 30)]}
            for i in range(100)
        }
    ).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 100 * (60 << 30))
    with pytest.raises(HostMemoryError, match=r"100 tensors needs 6000\.00 GiB"):
        load_files([path], in_place=False)


def test_a_tensor_larger_than_any_segment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "LARGEST_SEGMENT", 1000)
    with pytest.raises(HostMemoryError, match="'big' has 1200 bytes, the largest segment 1000"):
        load_tensors({"big": torch.zeros(300)})


def test_memory_that_runs_short_half_way_is_an_error_and_all_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SEGMENT_TARGET", 4096)
    create = Segment.create
    made: list[Segment] = []

    def create_three(nbytes: int) -> Segment:
        if len(made) == 3:
            raise HostMemoryError("no more")
        made.append(create(nbytes))
        return made[-1]

    monkeypatch.setattr(Segment, "create", create_three)
    with pytest.raises(HostMemoryError, match="no more"):
        load_tensors({f"t{i}": torch.ones(1000) for i in range(10)})
    assert [segment.fd for segment in made] == [-1, -1, -1]


@given(st.lists(st.lists(st.integers(0, 300), max_size=8), max_size=4), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_ranks_get_runs_of_whole_tensors_of_about_equal_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], world_size: int
) -> None:
    directory = tmp_path_factory.mktemp("split")
    paths = [directory / f"{index}.safetensors" for index in range(len(sizes))]
    for index, path in enumerate(paths):
        save_file({f"{index}.{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes[index])}, path)
    in_order = [
        (path, tensor.name, tensor.nbytes)
        for path, selection in zip(paths, select(paths), strict=True)
        for tensor in selection.tensors
    ]
    parts = split_among_ranks(select(paths), world_size)
    assert len(parts) == world_size
    assert [(path, name) for part in parts for path, names in part.items() for name in names] == [
        (path, name) for path, name, _ in in_order
    ]
    bytes_of = {name: nbytes for _, name, nbytes in in_order}
    total, largest = sum(bytes_of.values()), max(bytes_of.values(), default=0)
    for part in parts:
        held = sum(bytes_of[name] for names in part.values() for name in names)
        assert held <= total / world_size + largest + 1
    shutil.rmtree(directory)


def test_what_split_gives_can_be_loaded(tmp_path: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    for part in split_among_ranks(select(write_shards(tmp_path, model(), 2)), 3):
        filled = load_files(part)
        found |= contents(filled)
        free(filled)
    assert_same(found, model())


def test_no_ranks_are_refused() -> None:
    with pytest.raises(SettingError):
        split_among_ranks([], 0)


class _Wrapper(torch.Tensor):
    """As torchao's: it says a shape, and its elements lie in other tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: object, *_: object) -> object:
        raise NotImplementedError(function)


class _Plain(torch.Tensor):
    """Nothing but another name."""


def _freed() -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    parameter.untyped_storage().resize_(0)
    return parameter


def _cut_short() -> torch.Tensor:
    tensor = torch.ones(8)[2:]
    tensor.untyped_storage().resize_(16)
    return tensor


NO_DATA: dict[str, Callable[[], torch.Tensor]] = {
    "freed": _freed,
    "cut short": _cut_short,
    "wrapper": lambda: torch.Tensor._make_wrapper_subclass(_Wrapper, torch.Size([3])),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "lazy": UninitializedParameter,
    "zeros": lambda: torch._efficientzerotensor((3, 3)),
}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", NO_DATA)
def test_tensors_without_data_are_refused_before_anything_is_read(tmp_path: Path, kind: str, in_place: bool) -> None:
    store = CheckpointStore(CpuDevice(0))
    (tmp_path / "a.safetensors").write_bytes(b"never looked at")
    tensors = {"first": torch.ones(3), "layer.weight": NO_DATA[kind]()}
    with pytest.raises(UnsupportedTensorError, match=r"'layer.weight' has no plain data"):
        store.register("a", files=[tmp_path / "a.safetensors"], named_tensors=tensors, tensors_stay=in_place)
    with pytest.raises(UnsupportedTensorError, match=r"'layer.weight' has no plain data"):
        load_tensors(tensors)
    assert store.names() == []


def test_subclasses_with_data_of_their_own_are_taken() -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4).as_subclass(_Plain), "b": torch.nn.Buffer(torch.ones(3))}
    filled = load_tensors({**tensors, "c": tensors["a"].t()})
    assert_same(contents(filled), {**tensors, "c": tensors["a"].t()})
    free(filled)
