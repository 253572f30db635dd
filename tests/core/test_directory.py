"""Which files and tensors of a directory are sent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError
from checkpoint_engine.source.directory import find_files, read_directory, select_directory
from checkpoint_engine.source.loader import select
from tests.core.test_loader import model, write_shards

pytestmark = pytest.mark.pure


def test_shards_are_found_sorted(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, model(), 3)
    (tmp_path / "config.json").touch()
    assert find_files(tmp_path) == paths


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_decides_which_files_belong(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, model(), 2)
    save_file(model(), tmp_path / "consolidated.safetensors")
    write_index(tmp_path, {"a": paths[1].name, "b": paths[0].name, "c": paths[1].name})
    assert find_files(tmp_path) == paths


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, model(), 3)
    write_index(tmp_path, {path.name: path.name for path in paths})
    paths[1].unlink()
    with pytest.raises(CheckpointFormatError, match=f"missing: {re.escape(str(paths[1]))}; copy"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../secret.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/x.safetensors"},
        {"a": 3},
        {"a": "model.bin"},
        {"a": ["x"]},
        {},
        [],
        "x",
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "model.bin", tmp_path / "sub/x.safetensors", tmp_path.parent / "secret.safetensors"):
        path.touch()
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointFormatError, match=r"index\.json"):
        find_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{}", b"null", b'{"weight_map":' + b"[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match="is not an index"):
        find_files(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"holds no \.safetensors file"):
        find_files(tmp_path)
    with pytest.raises(CheckpointFormatError, match="is not a directory"):
        find_files(tmp_path / "none")


def sent(directory: Path) -> dict[str, str]:
    """Which file each tensor is taken from."""
    return {tensor.name: part.file.path.name for part in select_directory(directory) for tensor in part.tensors}


def test_of_tensors_in_two_shards_the_index_says_which_counts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3), "c": torch.ones(3), "d": torch.ones(3)}, tmp_path / "two.safetensors")
    with pytest.raises(DuplicateTensorError):
        select(find_files(tmp_path))
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"})
    # The index need not name all: engines take what else the files hold.
    expected = {"a": "one", "b": "two", "c": "one", "d": "two"}
    assert sent(tmp_path) == {name: f"{file}.safetensors" for name, file in expected.items()}


def test_an_index_that_errs_about_the_file_is_followed_as_far_as_it_can_be(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "two.safetensors", "b": "two.safetensors", "x": "one.safetensors"})
    with pytest.raises(CheckpointFormatError, match=r"in no file: x of one\.safetensors"):
        sent(tmp_path)
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    assert sent(tmp_path) == {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize(
    "beside",
    [
        "consolidated.safetensors",
        "consolidated-00001-of-00001.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "optimizer_0.safetensors",
        ".model.safetensors.part",
        ".hidden.safetensors",
    ],
)
def test_what_is_no_part_of_the_model_is_left_out_and_said(tmp_path: Path, beside: str) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(3)}, tmp_path / beside)
    found = read_directory(tmp_path)
    assert [path.name for path in found.files] == ["model.safetensors"]
    assert found.left_out == [beside] * beside.endswith(".safetensors")
    write_index(tmp_path, {"a": "model.safetensors"})
    indexed = read_directory(tmp_path)
    assert (indexed.files, indexed.left_out) == (found.files, found.left_out)


def test_modules_behind_a_model_are_left_out_and_said(tmp_path: Path) -> None:
    """Sentence-Transformers', which engines read at a start only."""
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(3)}, tmp_path / "2_Dense" / "model.safetensors")
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "../elsewhere")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = read_directory(tmp_path)
    assert [path.name for path in found.files] == ["model.safetensors"]
    assert found.left_out == ["2_Dense/model.safetensors"]
    (tmp_path / "modules.json").write_text("{")
    assert read_directory(tmp_path).left_out == []


def test_a_consolidated_file_alone_is_the_model_and_an_adapter_is_none(tmp_path: Path) -> None:
    save_file({"other": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"no \.safetensors file of a model, only adapter_model"):
        find_files(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    assert [path.name for path in find_files(tmp_path)] == ["consolidated.safetensors"]


def test_a_shard_that_is_not_there_is_named_without_an_index_too(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, model(), 3)
    assert find_files(tmp_path) == paths
    paths[1].unlink()
    with pytest.raises(CheckpointFormatError, match=r"of 00003 files model… in .* are missing: 2;"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["__0_0.distcp", ".metadata"], "torch's distributed checkpoint"),
        (["pytorch_model.bin"], "pytorch_model.bin, which are pickles"),
        (["config.json"], "$"),
    ],
)
def test_what_there_is_instead_is_called_by_its_name(tmp_path: Path, files: list[str], said: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointFormatError, match=rf"holds no \.safetensors file.*{said}"):
        find_files(tmp_path)


def shard_of(offset: int) -> dict[str, str]:
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [offset, 0]}})}


@pytest.mark.parametrize(
    ("name", "offset", "refused"),
    [
        ("shard-00001-model-00001-of-00002.safetensors", 0, True),
        ("model-00001-of-00001.safetensors", 4, True),
        ("model-00001-of-00001.safetensors", 0, False),
    ],
)
def test_parts_of_tensors_do_not_pass_for_the_whole(tmp_path: Path, name: str, offset: int, refused: bool) -> None:
    save_file({"a": torch.ones(4, 2)}, tmp_path / name, metadata=shard_of(offset))
    if refused:
        with pytest.raises(CheckpointFormatError, match="a shard of torch's distributed checkpoint"):
            select([tmp_path / name])
    else:
        assert len(select([tmp_path / name])[0].tensors) == 1


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", encoding="ascii")
    with pytest.raises(CheckpointFormatError, match="Git LFS's pointer to it; git lfs pull"):
        select_directory(tmp_path)
